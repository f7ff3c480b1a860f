"""One burst of the soak, as `make soak` runs it: the tool itself works, resumes, and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

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
