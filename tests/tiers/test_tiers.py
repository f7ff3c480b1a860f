"""Every tier against the conformance suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdx.tiers.conformance import CHECKS, MakeTier
from pdx.tiers.disk import DiskTier
from pdx.tiers.folder import Folder
from pdx.tiers.memory import MemoryTier
from pdx.tiers.tier import Tier


@contextmanager
def memory(cap_bytes: int) -> Iterator[Tier]:
    tier = MemoryTier(cap_bytes=cap_bytes)
    try:
        yield tier
        tier.check_integrity()
    finally:
        tier.close(drain_s=0.0)


def disk(path: Path, *, direct: bool = True, secret: bytes | None = None) -> MakeTier:
    @contextmanager
    def make(cap_bytes: int) -> Iterator[Tier]:
        tier = DiskTier(Folder.open(path, direct=direct), cap_bytes=cap_bytes, secret=secret)
        try:
            yield tier
            tier.check_integrity()
        finally:
            tier.close(drain_s=5.0)
        assert list((path / "tmp").iterdir()) == []

    return make


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["memory", "direct", "cached", "keyed"])
def test_conforms(check: Callable[[MakeTier], None], kind: str, tmp_path: Path) -> None:
    makers: dict[str, MakeTier] = {
        "memory": memory,
        "direct": disk(tmp_path),
        "cached": disk(tmp_path, direct=False),
        "keyed": disk(tmp_path, secret=bytes(32)),
    }
    check(makers[kind])
