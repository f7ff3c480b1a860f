"""What the soak is judged by, and one burst of it as `make soak` runs it: it works, resumes, and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from benchmarks.harness.report import Report
from benchmarks.soak.__main__ import Progress, _descriptors, judge_counts, main
from benchmarks.soak.burst import Failed

ROOT = Path(__file__).resolve().parents[2]
SEED = "5"  # bursts in which daemons and engines are killed and stopped, and two wires flip a bit


@pytest.mark.prove
def test_a_burst_finds_nothing_and_is_resumed(tmp_path: Path) -> None:
    for bursts in (1, 2):
        command = [
            *(sys.executable, "-m", "benchmarks.soak", "--seed", SEED, "--handoffs", str(200 * bursts)),
            *("--resume", str(tmp_path / "resume"), "--json", str(tmp_path / "report.json")),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((tmp_path / "resume").read_text())["bursts"] == bursts
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(bar["holds"] for bar in report["bars"].values())


COUNTS = {"answered": 95, "given up": 3, "lost": 2, "kill engine": 4, "cut wire": 6}
TOTALS = {"loads_ok": 80, "handoffs_by_tcp": 50, "handoffs_by_local": 45}


@pytest.mark.parametrize(
    ("counts", "totals", "asked", "misses"),
    [
        ({}, {}, {"handoffs": 100, "faults": 10}, []),
        ({}, {}, {"handoffs": 101, "faults": 11}, ["handoffs that were", "faults that were"]),
        ({"answered": 80, "lost": 17}, {}, {}, ["handoffs answered"]),
        ({}, {"loads_ok": 60}, {}, ["answers from pages"]),
        ({}, {"handoffs_by_tcp": 0, "handoffs_by_nixl": 50}, {}, ["handoffs between hosts"]),
    ],
)
def test_what_was_asked_for_must_be_done_and_by_loading(
    counts: dict[str, int], totals: dict[str, int], asked: dict[str, int], misses: list[str]
) -> None:
    report, options = Report("soak"), Namespace(**{"handoffs": None, "faults": None, **asked})
    judge_counts(report, Progress(1, counts=COUNTS | counts), Counter(TOTALS | totals), options, answered_before=0)
    missed = [name for name, bar in report.bars.items() if not bar["holds"]]
    assert len(missed) == len(misses)
    assert all(name.startswith(start) for name, start in zip(missed, misses, strict=True))


def test_answers_before_a_resumption_are_not_asked_of_these_daemons() -> None:
    report, options = Report("soak"), Namespace(handoffs=None, faults=None)
    judge_counts(report, Progress(1, counts=COUNTS), Counter(TOTALS | {"loads_ok": 40}), options, answered_before=50)
    assert report.all_hold


class Broken:
    """A soak whose start or first burst ends so."""

    def __init__(self, progress: Progress, error: BaseException, *, at_start: bool) -> None:
        self.progress, self.hosts, self.fds_grown, self.answered_before = progress, dict[str, object](), 0, 0
        self.closed = False
        self._error, self._at_start = error, at_start

    def start(self) -> None:
        if self._at_start:
            self.burst()

    def burst(self) -> None:
        self.progress.counts.update(COUNTS)
        raise self._error

    def close(self) -> list[int]:
        self.closed = True
        return []


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
def test_a_run_that_was_broken_off_is_closed_and_has_not_passed(
    error: BaseException, at_start: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    soaks: list[Broken] = []

    def started(scratch: Path, progress: Progress) -> Broken:
        soaks.append(Broken(progress, error, at_start=at_start))
        return soaks[-1]

    monkeypatch.setattr("benchmarks.soak.__main__.Soak", started)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # logs of what has not passed are kept
    flags = ["--json", str(tmp_path / "report.json")]
    if isinstance(error, KeyboardInterrupt):
        assert main(flags) == 1
        assert not json.loads((tmp_path / "report.json").read_text())["bars"]["interrupted"]["holds"]
    else:
        with pytest.raises(ZeroDivisionError):
            main(flags)
    assert soaks[0].closed


def test_descriptors_of_a_process_that_has_gone_are_a_finding() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(Failed, match="ended by itself"):
        _descriptors(process.pid)
