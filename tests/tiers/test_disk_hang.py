"""A disk that hangs, and answers again: on a clock of the test's own."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from tier_folder import OpenTier, block_files

from pdx.tiers.conformance import User, buffers, key_of, payload_of
from pdx.tiers.disk import DiskTier
from pdx.tiers.faulty import FaultyFiles
from pdx.tiers.health import PAUSE_S, PROBE_S, READ_ERRORS_MAX
from pdx.tiers.sealed import name_of
from pdx.tiers.tier import Event, Loaded, Missed, Read, StateChanged, Written


@dataclass
class Hung:
    """A tier that keeps block 1, and hangs in a read of it."""

    tier: DiskTier
    files: FaultyFiles
    now: list[float]
    ticket: int
    pages: list[memoryview]

    def after(self, seconds: float) -> list[Event]:
        self.now[0] += seconds
        return self.tier.take_events()

    def idle(self) -> list[Event]:
        """When all that it was given is done."""
        for crew in (self.tier._reads, self.tier._writes):
            assert crew.wait_idle(5.0)
        return self.tier.take_events()

    @property
    def finds(self) -> bool:
        return self.tier.contains([key_of(1)]) == [True]


@pytest.fixture
def hung(open_tier: OpenTier) -> Hung:
    now = [0.0]
    tier, files = open_tier(readers=1, writers=1, clock=lambda: now[0])
    User(tier).write(key_of(1))
    files.gate.clear()
    pages = buffers()
    ticket = tier.submit(Read(key_of(1), pages))
    assert ticket is not None and files.waiting.acquire(timeout=5.0)
    hung = Hung(tier, files, now, ticket, pages)
    assert hung.finds
    (changed,) = hung.after(31.0)
    assert isinstance(changed, StateChanged) and changed.state == "hung"
    assert not hung.finds
    return hung


def test_it_is_well_again_with_its_index_once_it_answers(hung: Hung, tmp_path: Path) -> None:
    tier, files = hung.tier, hung.files
    files.gate.set()
    assert isinstance(hung.idle()[0], Loaded), "the call that hung has come back"
    assert b"".join(hung.pages) == payload_of(key_of(1))
    writes = files.calls["write"]
    hung.after(PROBE_S / 2)
    hung.idle()
    assert (tier.stats().state, files.calls["write"]) == ("hung", writes), "not asked yet"
    before = tier.stats().changes
    hung.after(PROBE_S / 2)
    (changed,) = hung.idle()
    assert isinstance(changed, StateChanged) and changed.state == "well"
    assert tier.stats().changes > before
    assert hung.finds
    user = User(tier)
    assert isinstance(user.read(key_of(1))[0], Loaded)
    assert isinstance(user.write(key_of(2)), Written)
    assert len(block_files(tmp_path / "tier")) == 2, "the probe left nothing"
    assert files.calls["write"] == writes + 2


def test_an_answer_counts_for_nothing_while_another_call_hangs(hung: Hung) -> None:
    """The reading thread is still in the kernel; what the writing one is asked for passes."""
    stuck, hung.files.gate = hung.files.gate, threading.Event()
    hung.files.gate.set()
    hung.after(PROBE_S)
    assert hung.tier._writes.wait_idle(5.0)
    assert hung.tier.take_events() == []
    assert hung.files.calls["remove"] == 1, "the probe has passed"
    assert hung.tier.stats().state == "hung"
    stuck.set()
    hung.idle()
    hung.after(PROBE_S)
    assert [event.state for event in hung.idle() if isinstance(event, StateChanged)] == ["well"]


def test_a_probe_that_fails_is_repeated(hung: Hung) -> None:
    hung.files.gate.set()
    hung.idle()
    hung.files.errors["write"] = errno.EIO
    hung.after(PROBE_S)
    assert hung.idle() == []
    del hung.files.errors["write"]
    hung.after(PROBE_S)
    assert [event.state for event in hung.idle() if isinstance(event, StateChanged)] == ["well"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_probe_that_is_told_of_no_room_has_an_answer(hung: Hung, number: int, tmp_path: Path) -> None:
    """Else a disk that others have filled would be read no more, and no clear could free it."""
    hung.files.gate.set()
    hung.idle()
    hung.files.errors["write"] = number
    hung.after(PROBE_S)
    (changed,) = hung.idle()
    assert isinstance(changed, StateChanged) and (changed.state, changed.errno) == ("paused", number)
    assert hung.finds
    assert isinstance(User(hung.tier).read(key_of(1))[0], Loaded)
    hung.tier.remove(key_of(1))
    hung.idle()
    assert block_files(tmp_path / "tier") == []
    del hung.files.errors["write"]
    hung.after(PAUSE_S)
    assert isinstance(User(hung.tier).write(key_of(2)), Written)
    assert hung.tier.stats().state == "well"


def test_what_was_cleared_while_it_hung_goes_when_it_is_paused(hung: Hung, tmp_path: Path) -> None:
    hung.files.gate.set()
    hung.idle()
    hung.tier.remove(key_of(1))
    hung.files.errors["write"] = errno.ENOSPC
    hung.after(PROBE_S)
    hung.idle()
    hung.idle()
    assert hung.tier.stats().state == "paused"
    assert block_files(tmp_path / "tier") == []


def test_a_probe_that_hangs_is_the_only_one_and_comes_too_late(hung: Hung) -> None:
    writes = hung.files.calls["write"]
    for _ in range(5):
        hung.after(PROBE_S)
    assert hung.files.waiting.acquire(timeout=5.0)
    assert hung.files.calls["write"] == writes + 1
    hung.files.gate.set()
    hung.idle()
    assert hung.tier.stats().state == "hung", "it answered, four minutes later: it is asked anew"
    hung.idle()
    assert hung.tier.stats().state == "well"


def test_what_was_removed_meanwhile_is_deleted_when_it_answers(hung: Hung, tmp_path: Path) -> None:
    hung.files.gate.set()
    hung.idle()
    hung.tier.remove(key_of(1))
    assert len(block_files(tmp_path / "tier")) == 1, "a disk that hangs is not asked"
    hung.after(PROBE_S)
    hung.idle()
    hung.idle()
    assert hung.tier.stats().state == "well"
    assert not hung.finds
    assert block_files(tmp_path / "tier") == []


def test_a_tier_that_hung_and_is_closed_gives_its_folder_back(hung: Hung, open_tier: OpenTier) -> None:
    hung.files.gate.set()
    hung.idle()
    hung.after(PROBE_S)
    hung.tier.close(drain_s=5.0)
    again, _ = open_tier()
    assert again.contains([key_of(1)]) == [True]


def test_rot_is_for_good(open_tier: OpenTier) -> None:
    now = [0.0]
    tier, files = open_tier(clock=lambda: now[0])
    user = User(tier)
    for number in range(READ_ERRORS_MAX):
        user.write(key_of(number))
    files.errors["read"] = errno.EIO
    for number in range(READ_ERRORS_MAX):
        assert isinstance(user.read(key_of(number))[0], Missed)
    del files.errors["read"]
    calls = dict(files.calls)
    for _ in range(10):
        now[0] += PROBE_S
        tier.take_events()
    assert tier.stats().state == "off"
    assert files.calls["write"] == calls["write"]


def test_a_medium_that_gives_back_other_bytes_has_not_answered(hung: Hung, monkeypatch: pytest.MonkeyPatch) -> None:
    hung.files.gate.set()
    hung.idle()

    def forgets(name: str, *, head: memoryview, rest: list[memoryview]) -> int:
        return head.nbytes

    monkeypatch.setattr(hung.files, "read", forgets)
    hung.after(PROBE_S)
    assert hung.idle() == []
    assert hung.tier.stats().state == "hung"


def test_a_watcher_hears_of_all_that_is_found_again(hung: Hung) -> None:
    told: list[tuple[str, bool]] = []
    finds: list[bool] = []
    assert hung.tier.watch(lambda name, found: told.append((name, found)), finds.append) == [name_of(key_of(1))]
    assert finds == [False]
    hung.files.gate.set()
    hung.idle()
    assert (told, finds) == ([], [False])
    hung.after(PROBE_S)
    hung.idle()
    assert (told, finds) == ([], [False, True])
    hung.tier.remove(key_of(1))
    assert told == [(name_of(key_of(1)), False)]
    assert hung.tier.watch(lambda name, found: None, finds.append) == []
    assert finds == [False, True]
