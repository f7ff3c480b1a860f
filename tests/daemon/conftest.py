"""Daemons that end without a lease, a lane from outside pdx, a tier for one daemon's handoffs on one host."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from daemon.fleet import Fleet, fleet_in
from lanes_here import install_example

from pdx.tiers.memory import MemoryTier


@pytest.fixture
def unchecked_fleet(tmp_path: Path) -> Iterator[Fleet]:
    """For tests whose daemons may end with leases."""
    with fleet_in(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def fleet(unchecked_fleet: Fleet) -> Iterator[Fleet]:
    """Whoever of it is left in the end has no lease."""
    yield unchecked_fleet
    for daemon in unchecked_fleet.daemons:
        if daemon.process.poll() is None:
            daemon.wait_unleased()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons find the package of tests/transport/example_lane, which is not in pdx, by its entry point."""
    folder = tmp_path / "installed"
    folder.mkdir()
    install_example(folder)
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.fixture
def kind_of_tier() -> type[MemoryTier]:
    return MemoryTier


@pytest.fixture
def tier(kind_of_tier: type[MemoryTier]) -> Iterator[MemoryTier]:
    tier = kind_of_tier(cap_bytes=1 << 20)
    yield tier
    tier.close(drain_s=0.0)


@pytest.fixture
def asked(tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks the tier is asked for, each time."""
    asked: list[int] = []
    contains = tier.contains

    def counted(keys: Sequence[Any]) -> list[bool]:
        asked.append(len(keys))
        return contains(keys)

    monkeypatch.setattr(tier, "contains", counted)
    return asked
