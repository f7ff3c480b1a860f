"""What is NIXL's own: how a process ends that has used it. Lanes' conformance is checked with all the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from lane_pairs import needing

from pdx.transport.nixl import leave_efa_out

USER = "from pdx.transport.nixl import NixlFabric; NixlFabric().close(); print('closed')"


def device(devices: Path, name: str, driver: str) -> None:
    (devices.parent / "drivers" / driver).mkdir(parents=True)
    (devices / name / "device").mkdir(parents=True)
    (devices / name / "device" / "driver").symlink_to(devices.parent / "drivers" / driver)


@pytest.mark.parametrize(("driver", "chosen"), [("", "^efa"), ("mlx5_core", "^efa"), ("efa", None)])
def test_efa_s_module_is_loaded_only_for_its_device(tmp_path: Path, driver: str, chosen: str | None) -> None:
    devices = tmp_path / "infiniband"
    if driver:
        device(devices, "rdmap0s6", driver)
    environ: dict[str, str] = {}
    leave_efa_out(environ, devices)
    assert environ.get("UCX_MODULES") == chosen


def test_the_operator_s_choice_of_modules_stands(tmp_path: Path) -> None:
    environ = {"UCX_MODULES": "ib"}
    leave_efa_out(environ, tmp_path / "infiniband")
    assert environ == {"UCX_MODULES": "ib"}


@pytest.mark.parametrize("scheme", [pytest.param("nixl", marks=needing("nixl"))])
def test_a_process_that_has_used_it_ends_well(scheme: str) -> None:
    done = subprocess.run([sys.executable, "-c", USER], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr
