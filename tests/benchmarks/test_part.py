from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon.fleet import until

from benchmarks.harness.arms import Arm, Scratch
from benchmarks.harness.part import Part, cores_of
from benchmarks.harness.report import Report

BUSY = "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()\ninput()"


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Part]:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, start_new_session=True)
    started = Part("busy", process, tmp_path / "log", cpus=str(min(os.sched_getaffinity(0))))
    until(lambda: len(started.thread_ticks()) == 2, "it is busy")
    yield started
    started.kill()
    assert process.stdin is not None
    process.stdin.close()


def test_cores_are_read_as_taskset_reads_them() -> None:
    assert cores_of("0,2-4") == {0, 2, 3, 4}
    assert cores_of("1") == {1}


def test_every_thread_is_pinned(part: Part) -> None:
    part.pin()
    assert part.cores() == part.cpus


def test_a_paused_arm_takes_no_time(part: Part, tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        arm = _Still(scratch, "arm", "http://nowhere", [part], ready=lambda: True)
        with arm.active():
            before = arm.cpu_seconds()["busy"]
            until(lambda: arm.cpu_seconds()["busy"] > before, "it takes time")
        until(lambda: _states(part) == {"T"}, "it is stopped")
        spent = arm.cpu_seconds()["busy"]
        assert arm.cpu_seconds()["busy"] == spent
        report = Report("test")
        report.arm(arm)
        assert report.arms["arm"] == {"taskset": {"busy": part.cpus}, "cpu_s": {"busy": spent}}
        part.signal(signal.SIGCONT)


def test_the_scratch_folder_goes_with_success_and_stays_with_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Scratch(tmp_path) as scratch:
        assert scratch.folder.exists()
    assert not scratch.folder.exists()
    with pytest.raises(ValueError, match="broken"), Scratch(tmp_path) as kept:
        raise ValueError("broken")
    assert kept.folder.exists()


class _Still(Arm):
    """It serves nothing, so nothing is asked of it."""

    def probe(self) -> bool:
        return True


def _states(part: Part) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in part.pids}
