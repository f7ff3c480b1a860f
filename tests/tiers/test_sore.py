from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from tier_folder import CAP_BYTES

from pdx.tiers.conformance import BLOCK_BYTES, User, key_of
from pdx.tiers.disk import DiskTier
from pdx.tiers.folder import Folder, part_of
from pdx.tiers.health import PAUSE_S
from pdx.tiers.sealed import name_of
from pdx.tiers.sore import REST_S, STRIKES_MAX, Sore
from pdx.tiers.tier import Failed, Written

BAD = part_of(name_of(key_of(0)))


class OneBad(Folder):
    """Nothing can be written to or deleted from one of its folders."""

    failed = 0
    is_bad = True

    def write(self, name: str, buffers: Sequence[memoryview]) -> int:
        self._check(name)
        return super().write(name, buffers)

    def remove(self, name: str) -> None:
        self._check(name)
        super().remove(name)

    def _check(self, name: str) -> None:
        if self.is_bad and part_of(name) == BAD:
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_part_that_fails_while_others_do_not_is_left_alone_for_a_while() -> None:
    sore = Sore()
    for strike in range(STRIKES_MAX):
        assert sore.wrote("bad", ok=False, now=0.0) is None
        assert not sore.rests("bad", now=0.0)
        assert sore.wrote("good", ok=True, now=0.0) == ("bad" if strike == STRIKES_MAX - 1 else None)
    assert [sore.rests("bad", now=now) for now in (0.0, REST_S - 1, REST_S)] == [True, True, False]
    assert not sore.rests("good", now=0.0)


def test_a_whole_medium_that_fails_says_nothing_of_its_parts() -> None:
    sore = Sore()
    for number in range(10):
        for part in ("a", "b"):
            sore.wrote(part, ok=False, now=float(number))
    assert sore.wrote("a", ok=True, now=10.0) is None, "one strike, for that which failed last"
    assert not any(sore.rests(part, now=10.0) for part in ("a", "b"))


def test_a_write_that_goes_well_takes_back_what_was_held_against_its_part() -> None:
    sore = Sore()
    for _ in range(5):
        sore.wrote("a", ok=False, now=0.0)
        sore.wrote("b", ok=True, now=0.0)
        sore.wrote("a", ok=True, now=0.0)
    assert not sore.rests("a", now=0.0)


def test_one_bad_folder_pauses_the_disk_twice_an_hour(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    files = OneBad.open(tmp_path / "tier")
    tier = DiskTier(files, cap_bytes=CAP_BYTES, clock=lambda: now[0])
    user = User(tier)
    numbers = iter(range(1, 10_000))
    bad = [key_of(number) for number in range(2000) if part_of(name_of(key_of(number))) == BAD]

    def write_good() -> None:
        key = next(key for key in map(key_of, numbers) if part_of(name_of(key)) != BAD)
        assert isinstance(user.write(key), Written)

    for _ in range(STRIKES_MAX):
        assert isinstance(user.write(bad[0]), Failed)
        assert tier.stats().state == "paused"
        now[0] += PAUSE_S
        write_good()
    assert f"folder {BAD} " in caplog.text
    for key in bad:
        end = user.write(key)
        assert isinstance(end, Failed) and not end.again
        assert tier.stats().state == "well"
    assert files.failed == STRIKES_MAX
    now[0] += REST_S
    files.is_bad = False
    assert isinstance(user.write(bad[0]), Written)
    tier.close(drain_s=5.0)


def test_a_full_tier_deletes_others_than_those_of_a_bad_folder(tmp_path: Path) -> None:
    now = [0.0]
    files = OneBad.open(tmp_path / "tier")
    files.is_bad = False
    tier = DiskTier(files, cap_bytes=CAP_BYTES, clock=lambda: now[0])
    user = User(tier)
    ours = key_of(0)
    user.write(ours)
    files.is_bad = True
    for number in range(1, 4 * CAP_BYTES // BLOCK_BYTES):
        if isinstance(user.write(key_of(number)), Failed):
            now[0] += PAUSE_S
    assert 1 <= files.failed <= STRIKES_MAX + 1
    assert tier.contains([ours]) == [True]
    tier.check_integrity()
    tier.close(drain_s=5.0)
