"""In which folder a block's file lies."""

from __future__ import annotations

import shutil
from pathlib import Path

from tier_folder import OpenTier, block_files

from pdx.tiers.conformance import User, key_of
from pdx.tiers.tier import Loaded, Written


def test_the_blocks_of_one_model_are_in_many_folders(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, _ = open_tier()
    user = User(tier)
    for number in range(30):
        user.write(key_of(number))
    assert len({path.parent for path in block_files(tmp_path / "tier")}) > 15


def test_files_where_earlier_versions_put_them_are_read_and_deleted(open_tier: OpenTier, tmp_path: Path) -> None:
    """Also one that lies there and in its new place."""
    tier, _ = open_tier()
    for number in range(3):
        User(tier).write(key_of(number))
    used_bytes = tier.stats().used_bytes
    tier.close(drain_s=1.0)
    first, *others = block_files(tmp_path / "tier")
    old = tmp_path / "tier" / first.name[:2]
    for path in others:
        path.rename(old / path.name)
    shutil.copyfile(first, old / first.name)
    again, _ = open_tier()
    assert again.stats().used_bytes > used_bytes, "both are charged"
    for number in range(3):
        assert isinstance(User(again).read(key_of(number))[0], Loaded)
    for number in range(3):
        again.remove(key_of(number))
    assert again._writes.wait_idle(5.0)
    again.take_events()
    assert block_files(tmp_path / "tier") == []
    assert isinstance(User(again).write(key_of(1)), Written)
    (path,) = block_files(tmp_path / "tier")
    assert path.parent.name == path.name[-2:]
