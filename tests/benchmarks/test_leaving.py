"""What a benchmark has started ends when the benchmark is told to end, in whichever way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.harness.leaving import leaving
from benchmarks.harness.rig import REPOSITORY
from pdx.launch import processes

# A rig of one program in a session of its own, that has a child.
BENCHMARK = """
import signal, sys, time
from pathlib import Path
from benchmarks.harness.rig import Rig
with Rig(Path("/no/model"), Path(sys.argv[1])) as rig:
    part = rig.start_program("part", ["sh", "-c", "sleep 600 & wait"])
    while len(part.pids) < 2:
        time.sleep(0.01)
    print(part.process.pid, flush=True)
    signal.pause()
"""
END_S = 60.0


def start(folder: Path, before: Sequence[str] = ()) -> tuple[subprocess.Popen[str], int]:
    """The benchmark, and the session of what it has started."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [*before, sys.executable, "-c", BENCHMARK, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str], session: int) -> None:
    process.kill()
    process.wait(END_S)
    processes.kill(processes.of_sessions({session}))
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_that_a_rig_has_started(number: signal.Signals, tmp_path: Path) -> None:
    process, session = start(tmp_path)
    try:
        process.send_signal(number)
        assert process.wait(END_S) == -signal.SIGINT
        assert processes.of_sessions({session}) == []
    finally:
        end(process, session)


def test_a_hangup_that_nohup_has_ignored_ends_nothing(tmp_path: Path) -> None:
    process, session = start(tmp_path, ("env", "--ignore-signal=HUP"))
    try:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == -signal.SIGINT
        assert processes.of_sessions({session}) == []
    finally:
        end(process, session)


def test_a_second_signal_does_not_break_off_what_the_first_has_begun() -> None:
    with pytest.raises(KeyboardInterrupt, match="SIGHUP"), leaving(), leaving():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_signals_that_somebody_handles_stay_so() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with leaving():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
