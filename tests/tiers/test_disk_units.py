"""File systems that give room in larger pieces than 4 KiB: the cap holds there, too."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdx.errors import TierUnusable
from pdx.layout import round_up
from pdx.tiers.conformance import User
from pdx.tiers.disk import DiskTier
from pdx.tiers.folder import FOLDER_UNITS, Folder
from pdx.tiers.tier import Written

CLUSTER_BYTES = 64 << 10
CAP_BYTES = (2 * FOLDER_UNITS + 1) * CLUSTER_BYTES


class Clustered(Folder):
    """What st_blocks says on ext4 with bigalloc."""

    def write(self, name: str, buffers: Sequence[memoryview]) -> int:
        return round_up(super().write(name, buffers), CLUSTER_BYTES)


def test_the_cap_holds_where_files_take_whole_clusters(tmp_path: Path) -> None:
    files = Clustered.open(tmp_path / "tier")
    assert files.unit_bytes == CLUSTER_BYTES
    tier = DiskTier(files, cap_bytes=CAP_BYTES)
    user = User(tier)
    page = memoryview(mmap.mmap(-1, 8192))
    for number in range(FOLDER_UNITS):
        assert isinstance(user.write((b"n", b"%d" % number), pages=[page]), Written)
        assert tier.stats().used_bytes <= CAP_BYTES
    assert tier.stats().evicted
    tier.check_integrity()
    tier.close(drain_s=1.0)
    again = DiskTier(Clustered.open(tmp_path / "tier"), cap_bytes=CAP_BYTES)
    assert again.stats().used_bytes <= CAP_BYTES
    again.close(drain_s=1.0)


def test_room_that_is_told_later_is_charged_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZFS has one sector for a new file until it has written its transactions."""
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: SimpleNamespace(st_size=fstat(fd).st_size, st_blocks=1))
    files = Folder.open(tmp_path / "tier")
    assert files.write("ab", [memoryview(mmap.mmap(-1, CLUSTER_BYTES))]) == CLUSTER_BYTES
    files.close()


def test_folders_alone_may_take_more_than_the_cap(tmp_path: Path) -> None:
    files = Clustered.open(tmp_path / "tier")
    with pytest.raises(TierUnusable, match="takes at least"):
        DiskTier(files, cap_bytes=4 << 20)
    files.close()


def test_the_measured_unit_leaves_nothing_behind(tmp_path: Path) -> None:
    files = Folder.open(tmp_path / "tier")
    assert files.unit_bytes >= 4096 and files.unit_bytes % 512 == 0
    assert (files.scan(), list((tmp_path / "tier" / "tmp").iterdir()), files.unaligned) == ([], [], 0)
    files.close()
