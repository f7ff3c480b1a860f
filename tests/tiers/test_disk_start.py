"""Starting on a disk that is not well: what can be read serves, what can't be deleted is charged, the rest is off."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tier_folder import CAP_BYTES, FOLDER_BYTES, OpenTier, block_files, taken_bytes

from pdx.errors import TierBroken, TierUnusable
from pdx.layout import ALIGN_BYTES
from pdx.tiers.conformance import User, block, buffers, key_of
from pdx.tiers.deletions import AGAIN_S
from pdx.tiers.disk import DiskTier
from pdx.tiers.faulty import FaultyFiles
from pdx.tiers.folder import Folder
from pdx.tiers.sealed import name_of
from pdx.tiers.tier import Failed, Loaded, Missed, Read, StateChanged, Write

KEYS = [(b"%d" % number * 32, b"block") for number in range(10)]


def fails(call: Callable[..., Any], number: int, *, at: Callable[[str], bool]) -> Callable[..., Any]:
    def failing(path: Any, *rest: Any) -> Any:
        if at(os.fspath(path)):
            raise OSError(number, os.strerror(number))
        return call(path, *rest)

    return failing


@pytest.fixture
def ten(open_tier: OpenTier) -> list[str]:
    """The names of ten blocks that an earlier life has left."""
    tier, _ = open_tier()
    for number in range(10):
        User(tier).write(KEYS[number])
    tier.close(drain_s=1.0)
    return [name_of(key) for key in KEYS]


def test_one_bad_folder_is_left_out(
    ten: list[str], open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = ten[3][-2:]
    monkeypatch.setattr(os, "scandir", fails(os.scandir, errno.EIO, at=lambda path: path.endswith(f"/{bad}")))
    tier, _ = open_tier()
    assert tier.contains(KEYS) == [name[-2:] != bad for name in ten]
    assert tier.unseen.startswith("1 folders or files of ")
    assert "EIO" in caplog.text
    assert isinstance(
        User(tier).read(next(key for key, name in zip(KEYS, ten, strict=True) if name[-2:] != bad))[0], Loaded
    )


def test_one_bad_inode_is_left_out(ten: list[str], open_tier: OpenTier, caplog: pytest.LogCaptureFixture) -> None:
    class OneBad(Folder):
        def _found_in(self, folder: str, entries: Any) -> Any:
            return super()._found_in(folder, [Bad(entry) if entry.name == ten[3] else entry for entry in entries])  # type: ignore[arg-type]

    class Bad:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path = entry.name, entry.path

        def is_file(self, *, follow_symlinks: bool) -> bool:
            return True

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            raise OSError(errno.EUCLEAN, "Structure needs cleaning")

    tier, files = open_tier()
    path = files._files.path  # type: ignore[attr-defined]
    tier.close(drain_s=0.0)
    folder = OneBad.open(path)
    assert not folder.unseen
    assert {found.name for found in folder.scan()} == set(ten) - {ten[3]}
    assert folder.unseen.startswith("1 folders or files of ")
    assert "EUCLEAN" in caplog.text
    folder.close()


def test_a_file_of_somebody_elses_is_none_of_ours(open_tier: OpenTier, tmp_path: Path) -> None:
    """Whatever it is called: from a block's name its watcher reads a number."""
    open_tier()[0].close(drain_s=0.0)
    stranger = tmp_path / "tier/ab" / "ab".ljust(64, "z")
    stranger.write_bytes(bytes(2 * ALIGN_BYTES))
    tier, _ = open_tier()
    assert tier.watch(lambda name, found: None, lambda finds: None) == []
    assert stranger.exists()


def test_a_torn_file_that_cannot_be_deleted_is_charged_and_tried_again(
    ten: list[str], open_tier: OpenTier, tmp_path: Path
) -> None:
    path = next(path for path in block_files(tmp_path / "tier") if path.name == ten[0])
    path.write_bytes(b"half a block")
    now = [0.0]
    files = FaultyFiles(Folder.open(tmp_path / "tier"))
    files.errors["remove"] = errno.EIO
    tier = DiskTier(files, cap_bytes=CAP_BYTES, clock=lambda: now[0])
    assert tier.contains(KEYS[:2]) == [False, True]
    assert path.exists()
    assert tier.stats().used_bytes >= taken_bytes(tmp_path / "tier")
    tier.check_integrity()
    del files.errors["remove"]
    now[0] += AGAIN_S
    tier.take_events()
    assert tier._writes.wait_idle(5.0)
    tier.take_events()
    assert not path.exists()
    tier.close(drain_s=1.0)


def test_what_is_too_much_and_cannot_be_deleted_stays_charged(ten: list[str], tmp_path: Path) -> None:
    files = FaultyFiles(Folder.open(tmp_path / "tier"))
    files.errors["remove"] = errno.EROFS
    tier = DiskTier(files, cap_bytes=2 * FOLDER_BYTES)
    assert len(block_files(tmp_path / "tier")) == 10
    assert tier.stats().used_bytes >= taken_bytes(tmp_path / "tier")
    tier.close(drain_s=1.0)


def test_a_leftover_that_cannot_be_deleted_takes_of_the_cap(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, _ = open_tier()
    used_bytes = tier.stats().used_bytes
    tier.close(drain_s=1.0)
    (tmp_path / "tier" / "tmp" / "a folder").mkdir()  # which unlink() refuses, even to root
    again, _ = open_tier()
    assert again.stats().used_bytes == used_bytes + 4096
    assert again.stats().cap_bytes == CAP_BYTES


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC, errno.ESTALE])
def test_a_broken_device_is_no_wrong_setting(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", fails(os.listdir, number, at=lambda path: path.endswith("tier")))
    with pytest.raises(TierBroken, match=errno.errorcode[number]) as raised:
        DiskTier.open(tmp_path / "tier", cap_bytes=CAP_BYTES)
    assert raised.value.errno == number
    monkeypatch.setattr(os, "listdir", fails(os.listdir, errno.EACCES, at=lambda path: path.endswith("tier")))
    with pytest.raises(TierUnusable) as refused:
        DiskTier.open(tmp_path / "tier", cap_bytes=CAP_BYTES)
    assert not isinstance(refused.value, TierBroken)


def test_folders_that_can_all_not_be_read_are_a_broken_device(
    ten: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "scandir", fails(os.scandir, errno.EIO, at=lambda path: True))
    with pytest.raises(TierBroken, match="EIO"):
        DiskTier.open(tmp_path / "tier", cap_bytes=CAP_BYTES)


def test_a_tier_that_is_off_says_so_and_takes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tier = DiskTier.off(TierBroken("/d can't hold a disk tier: Input/output error (EIO)", errno.EIO), cap_bytes=1 << 30)
    (event,) = tier.take_events()
    assert isinstance(event, StateChanged) and (event.state, event.errno) == ("off", errno.EIO)
    assert (tier.stats().state, tier.stats().errno, tier.stats().blocks) == ("off", errno.EIO, 0)
    assert "EIO" in caplog.text
    user = User(tier)
    assert isinstance(user.end_of(user.ask(Write(key_of(1), block(key_of(1))))), Failed)
    assert isinstance(user.end_of(user.ask(Read(key_of(1), buffers()))), Missed)
    assert tier.contains([key_of(1)]) == [False]
    tier.close(drain_s=1.0)
    with pytest.raises(TierUnusable, match="takes at least"):
        DiskTier.off(TierBroken("broken", errno.EIO), cap_bytes=1)
