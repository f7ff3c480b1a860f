"""Two real processes, one of them killed in the middle of a put."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from pdx.transport.api import Copy, PutDone, PutFailed
from pdx.transport.side import Side, losses_of
from pdx.transport.tcp import TcpLane

HERE = Path(__file__).parent
KEY = b"0123456789abcdef"
MEMORY_BYTES = 8 << 20


def test_peer_killed_in_mid_put() -> None:
    environ = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    near = Side(TcpLane("tcp://127.0.0.1:0", key=KEY, name="near"), seed=1, memory_bytes=MEMORY_BYTES)
    peer = subprocess.Popen(
        [sys.executable, str(HERE / "far_process.py")], stdout=subprocess.PIPE, text=True, env=environ
    )
    try:
        assert peer.stdout is not None
        endpoint, window = peer.stdout.readline().split()
        channel = near.lane.connect(endpoint)
        whole = [Copy(0, 0, MEMORY_BYTES)]
        first = near.put(channel, int(window), whole, notice=b"first")
        assert near.wait_end(first) == PutDone(first)
        assert peer.stdout.readline() == "first\n"
        # A stopped process reads nothing: 64 MiB are more than its socket takes, so the kill hits a put under way.
        peer.send_signal(signal.SIGSTOP)
        tickets = [near.put(channel, int(window), whole, notice=b"never") for _ in range(8)]
        peer.kill()
        near.wait_lost(channel)
        ends = [near.wait_end(ticket) for ticket in tickets]
        assert isinstance(ends[-1], PutFailed)
        assert near.events.index(ends[-1]) < near.events.index(losses_of(near.events, channel)[0])
        assert peer.stdout.read() == ""
    finally:
        peer.kill()
        peer.wait(10)
        assert peer.stdout is not None
        peer.stdout.close()
        near.lane.abort()
