"""Which RDMA devices count, by the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdx.transport.rdma import rdma_here


def machine(root: Path, ports: dict[str, str], *, can_open: bool = True) -> tuple[Path, Path]:
    devices, verbs = root / "infiniband", root / "dev"
    for name, state in ports.items():
        (devices / name / "ports" / "1").mkdir(parents=True)
        (devices / name / "ports" / "1" / "state").write_text(f"{state}\n")
    verbs.mkdir()
    if can_open:
        (verbs / "uverbs0").touch()
    return devices, verbs


def test_devices_with_an_active_port_count(tmp_path: Path) -> None:
    found = rdma_here(*machine(tmp_path, {"mlx5_1": "4: ACTIVE", "mlx5_0": "4: ACTIVE", "mlx5_2": "1: DOWN"}))
    assert (found.devices, found.lack) == (("mlx5_0", "mlx5_1"), "")


@pytest.mark.parametrize(
    ("ports", "can_open", "lack"),
    [
        ({}, True, "no RDMA device here"),
        ({"mlx5_0": "1: DOWN"}, True, "no port of mlx5_0 is active"),
        ({"mlx5_0": "4: ACTIVE"}, False, "mlx5_0 can't be opened"),
    ],
)
def test_why_there_is_none(tmp_path: Path, ports: dict[str, str], can_open: bool, lack: str) -> None:
    found = rdma_here(*machine(tmp_path, ports, can_open=can_open))
    assert not found.devices
    assert found.lack.startswith(lack)
