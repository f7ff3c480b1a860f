"""A disk tier of the test's own, over files that can be made to fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tier_folder import CAP_BYTES, OpenTier

from pdx.tiers.disk import DiskTier
from pdx.tiers.faulty import FaultyFiles
from pdx.tiers.folder import Folder


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[OpenTier]:
    """Opens the disk tier of this test's folder, again if it was closed; closed and checked at the end."""
    tiers: list[DiskTier] = []

    def open_it(*, cap_bytes: int = CAP_BYTES, **options: object) -> tuple[DiskTier, FaultyFiles]:
        files = FaultyFiles(Folder.open(tmp_path / "tier"))
        tier = DiskTier(files, cap_bytes=cap_bytes, **options)  # type: ignore[arg-type]
        tiers.append(tier)
        return tier, files

    yield open_it
    for tier in tiers:
        tier.close(drain_s=5.0)
        tier.check_integrity()
