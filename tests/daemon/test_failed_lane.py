"""A daemon whose lane has failed in itself ends: the lane's windows never close, and so their slots are never free."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lanes_here import install_example

DOOMED = """
from cma_lane import CmaFabric
from pdx.transport.onesided import OneSidedLane


class DoomedLane(OneSidedLane):
    def __init__(self, url, *, key, name):
        super().__init__(url, scheme="doomed", key=key, name=name, make_fabric=CmaFabric)

    def register(self, memory):
        self._reactor.call(lambda: 1 / 0)
        return super().register(memory)
"""


def test_a_daemon_ends_with_a_lane_that_failed(tmp_path: Path) -> None:
    packages, run_dir = tmp_path / "packages", tmp_path / "run"
    packages.mkdir()
    install_example(packages)
    (packages / "doomed_lane.py").write_text(DOOMED)
    with next(packages.glob("*.dist-info/entry_points.txt")).open("a") as entries:
        entries.write("\ndoomed = doomed_lane:DoomedLane\n")
    done = subprocess.run(
        [sys.executable, "-m", "pdx.daemon.main", f"--run-dir={run_dir}", "--arena=4MiB", "--transport=doomed"],
        env={**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("pdxd: lane doomed failed: internal error: ZeroDivisionError")
    assert not (run_dir / "pdxd.json").exists()
