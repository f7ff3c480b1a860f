"""A tier for one Mover on one host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdx.tiers.memory import MemoryTier


@pytest.fixture
def tier() -> Iterator[MemoryTier]:
    tier = MemoryTier(cap_bytes=1 << 20)
    yield tier
    tier.close(drain_s=0.0)
