"""Files that are to be deleted: at once, later, or by the tier's next life."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from tier_folder import OpenTier, block_files

from pdx.tiers.conformance import User, buffers, key_of, payload_of
from pdx.tiers.disk import DiskTier
from pdx.tiers.health import Health
from pdx.tiers.tier import Failed, Loaded, Missed, Read, Written


def test_what_a_failed_write_left_behind_is_deleted_later(
    open_tier: OpenTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    tier, _ = open_tier(clock=lambda: now[0])
    user = User(tier)
    used_bytes = tier.stats().used_bytes

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fails)
        patched.setattr(Path, "unlink", fails)
        assert isinstance(user.write(key_of(1)), Failed)
        assert tier._writes.wait_idle(5.0)
        tier.take_events()
    assert len(list((tmp_path / "tier" / "tmp").iterdir())) == 1
    assert tier.stats().used_bytes > used_bytes
    now[0] = 31.0
    tier.take_events()
    assert tier._writes.wait_idle(5.0)
    tier.take_events()
    assert list((tmp_path / "tier" / "tmp").iterdir()) == []
    assert tier.stats().used_bytes == used_bytes
    assert isinstance(user.write(key_of(1)), Written)


def test_what_is_removed_while_it_is_read_goes_afterwards(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, files = open_tier()
    user = User(tier)
    user.write(key_of(1))
    files.gate.clear()
    pages = buffers()
    ticket = user.ask(Read(key_of(1), pages))
    tier.remove(key_of(1))
    assert tier.contains([key_of(1)]) == [False]
    files.gate.set()
    assert isinstance(user.end_of(ticket), Loaded)
    assert b"".join(pages) == payload_of(key_of(1))
    tier.close(drain_s=5.0)
    assert block_files(tmp_path / "tier") == []


def test_removals_are_done_when_the_tier_closes(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, _ = open_tier()
    user = User(tier)
    for number in range(20):
        user.write(key_of(number))
    for number in range(20):
        tier.remove(key_of(number))
    tier.close(drain_s=5.0)
    assert block_files(tmp_path / "tier") == []


def crash(tier: DiskTier) -> None:
    """As far as its folder knows."""
    tier.files._files.close()  # type: ignore[attr-defined]


def test_removals_that_there_is_no_time_for_are_left_to_the_next_life(open_tier: OpenTier, tmp_path: Path) -> None:
    """Which finds none of them, nor does one after a crash; but what it has written anew is kept."""
    tier, files = open_tier(writers=1)
    user = User(tier)
    for number in range(50):
        user.write(key_of(number))
    files.gate.clear()
    for number in range(50):
        tier.remove(key_of(number))
    assert files.waiting.acquire(timeout=5.0)
    opener = threading.Thread(target=lambda: (tier._reads._threads[0].join(), files.gate.set()))
    opener.start()  # one is under way, and goes on when close() has withdrawn the others
    tier.close(drain_s=0.0)
    opener.join()
    assert len(block_files(tmp_path / "tier")) > 45, "they were not waited for"
    crash(open_tier()[0])
    again, _ = open_tier(writers=1)
    assert not any(again.contains([key_of(number) for number in range(50)]))
    for _ in range(10):
        assert again._writes.wait_idle(5.0)
        again.take_events()
    assert block_files(tmp_path / "tier") == []
    assert isinstance(User(again).write(key_of(1)), Written)
    crash(again)
    third, _ = open_tier()
    assert third.contains([key_of(0), key_of(1)]) == [False, True]
    third.close(drain_s=5.0)
    assert list((tmp_path / "tier" / "tmp").iterdir()) == []


def test_a_removal_that_failed_is_tried_again(open_tier: OpenTier, tmp_path: Path) -> None:
    now = [0.0]
    tier, files = open_tier(health=Health(pause_s=30), clock=lambda: now[0])
    user = User(tier)
    user.write(key_of(1))
    used_bytes = tier.stats().used_bytes
    files.errors["remove"] = errno.EIO
    tier.remove(key_of(1))
    assert tier._writes.wait_idle(5.0)
    tier.take_events()
    assert (tier.stats().state, tier.stats().used_bytes) == ("well", used_bytes), "one bad folder is not a bad disk"
    assert tier.stats().io_errors == 1
    assert isinstance(user.read(key_of(1))[0], Missed)
    del files.errors["remove"]
    now[0] = 31.0
    tier.take_events()
    assert tier._writes.wait_idle(5.0)
    tier.take_events()
    assert tier.stats().used_bytes < used_bytes
    assert block_files(tmp_path / "tier") == []
