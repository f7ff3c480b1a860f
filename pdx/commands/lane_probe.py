"""One end of a lane that `pdx check` tries, in a process of its own: what it says is one JSON line for each step.

    python -m pdx.commands.lane_probe receive SCHEME     says where it listens, then at what rate bytes came
    python -m pdx.commands.lane_probe send SCHEME        reads that from its input

Both read the key first, a line of hex. A first round of puts is not timed, and the last one is compared byte by byte.
"""

from __future__ import annotations

import json
import mmap
import random
import select
import sys
import time
from collections.abc import Callable, Sequence

from pdx.errors import PdxError, PeerGone
from pdx.transport.api import Arrived, Copy, Event, Lane, PeerLost, PutFailed, Region, Span
from pdx.transport.registry import open_lane

PUT_BYTES = 1 << 20
PUTS = 8
ROUND_BYTES = PUT_BYTES * PUTS
ROUNDS = 16  # timed
SILENCE_S = 20.0
SEED = 1


def main(argv: Sequence[str]) -> int:
    role, scheme = argv
    try:
        key = bytes.fromhex(sys.stdin.readline().strip())
        lane = open_lane(f"{scheme}://127.0.0.1:0", key=key, name=f"pdx-check-{role}")
        try:
            {"receive": _receive, "send": _send}[role](lane, mmap.mmap(-1, ROUND_BYTES))
            lane.close(drain_s=1.0)
        finally:
            lane.abort()
    except PdxError as error:
        _say(error=str(error))
        return 1
    return 0


def _receive(lane: Lane, memory: mmap.mmap) -> None:
    region = lane.register(memoryview(memory))
    window = region.open_window([Span(0, ROUND_BYTES)])
    _say(endpoint=lane.endpoint, window=window)
    arrived, started_s = 0, 0.0

    def take(event: Event) -> bool:
        nonlocal arrived, started_s
        arrived += isinstance(event, Arrived)
        if arrived == PUTS and not started_s:
            started_s = time.perf_counter()
        return arrived == PUTS * (1 + ROUNDS)

    _until(lane, take)
    took_s = time.perf_counter() - started_s
    if bytes(memory) != _content():
        _say(error="what landed is not what was put")
        return
    _say(bytes_per_s=ROUNDS * ROUND_BYTES / took_s)
    sys.stdin.readline()  # until the sender has ended: nobody breaks with it


def _send(lane: Lane, memory: mmap.mmap) -> None:
    there = json.loads(sys.stdin.readline())
    region = lane.register(memoryview(memory))
    channel = lane.connect(there["endpoint"])
    for round_number in range(1 + ROUNDS):
        if round_number == ROUNDS:
            memory[:] = _content()
        _put(lane, channel, region, there["window"])
    _say(done=True)


def _put(lane: Lane, channel: int, region: Region, window: int) -> None:
    """One round, to its end."""
    copies = [Copy(start, start, PUT_BYTES) for start in range(0, ROUND_BYTES, PUT_BYTES)]
    for copy in copies:
        lane.put(channel, region=region, window=window, copies=[copy], notice=b"", queue=b"check", urgency=0.0)
    left = PUTS

    def take(event: Event) -> bool:
        nonlocal left
        if isinstance(event, PutFailed | PeerLost):
            raise PeerGone(event.reason)
        left -= 1
        return left == 0

    _until(lane, take)


def _until(lane: Lane, take: Callable[[Event], bool]) -> None:
    """Raises PeerGone after SILENCE_S without an event."""
    while True:
        if not select.select([lane], [], [], SILENCE_S)[0]:
            raise PeerGone(f"nothing came for {SILENCE_S:g} s")
        for event in lane.take_events():
            if take(event):
                return


def _content() -> bytes:
    return random.Random(SEED).randbytes(ROUND_BYTES)  # noqa: S311 - known on both sides, not secret


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
