"""The ledger against a model of the medium: files that appear and disappear in the order in which writes work."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdx.buffer.evict import Lru, Policy
from pdx.buffer.s3fifo import S3Fifo
from pdx.errors import IllegalTransition
from pdx.tiers.ledger import MOVES, Entry, EntryEvent, EntryState, Ledger

CAP_BYTES = 1000
NAMES = st.sampled_from([f"n{number}" for number in range(12)])


def test_only_the_table_moves() -> None:
    ledger = Ledger(cap_bytes=1, policy=Lru())
    for state, event in itertools.product(EntryState, get_args(EntryEvent)):
        entry = Entry("n", 1, state)
        if (state, event) in MOVES:
            ledger._move(entry, event)
            assert entry.state is MOVES[state, event]
        else:
            with pytest.raises(IllegalTransition):
                ledger._move(entry, event)
            assert entry.state is state


class LedgerMachine(RuleBasedStateMachine):
    """`medium` is what a disk would hold; every step of a write is a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(cap_bytes=CAP_BYTES, policy=self.policy(), group_of=lambda name: (name[-1], ""))
        self.medium: dict[str, int] = {}
        self.writing: dict[str, tuple[int, list[str], list[str]]] = {}  # bytes, victims left and deleted
        self.half_written: dict[str, int] = {}
        self.reading: list[str] = []
        self.doomed: set[str] = set()
        self.condemned: set[str] = set()

    def policy(self) -> Policy[str]:
        return Lru()

    @rule(name=NAMES, size_bytes=st.integers(1, 1100))
    def reserve(self, name: str, size_bytes: int) -> None:
        if self.ledger.state(name) is not EntryState.GONE:
            return
        victims = self.ledger.reserve(name, size_bytes)
        if victims is None:
            idle = [other for other in self.medium if self.ledger.finds(other) and other not in self.reading]
            freeable = sum(self.medium[other] for other in idle)
            assert self.ledger.used_bytes - freeable + size_bytes > CAP_BYTES
            return
        assert not set(victims) & set(self.reading)
        self.writing[name] = size_bytes, list(victims), []

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        """A thread deletes the next victim, or writes half of the file."""
        name = data.draw(st.sampled_from(sorted(self.writing)))
        size_bytes, victims, deleted = self.writing[name]
        if victims:
            del self.medium[victims[0]]
            deleted.append(victims.pop(0))
        else:
            self.half_written[name] = size_bytes

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), is_published=st.booleans(), less_bytes=st.integers(0, 10))
    def settle(self, data: st.DataObject, is_published: bool, less_bytes: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.writing)))
        size_bytes, victims, deleted = self.writing[name]
        is_published = is_published and not victims
        del self.writing[name]
        self.half_written.pop(name, None)
        real_bytes = max(1, size_bytes - less_bytes) if is_published else None
        self.doomed |= set(self.ledger.settle(name, deleted=deleted, published_bytes=real_bytes))
        if real_bytes is not None:
            self.medium[name] = real_bytes
        assert self.ledger.finds(name) == is_published

    @rule(name=NAMES)
    def begin_read(self, name: str) -> None:
        if self.ledger.finds(name):
            self.ledger.begin_read(name)
            self.reading.append(name)

    @precondition(lambda self: self.reading)
    @rule()
    def end_read(self) -> None:
        name = self.reading.pop(0)
        if self.ledger.end_read(name):
            self.doomed.add(name)

    @rule(name=NAMES)
    def condemn(self, name: str) -> None:
        if self.ledger.condemn(name):
            assert name not in self.reading
            self.doomed.add(name)
        assert not self.ledger.finds(name)
        self.condemned |= {name} & set(self.medium)

    @precondition(lambda self: self.doomed)
    @rule()
    def delete(self) -> None:
        name = min(self.doomed)
        self.doomed.remove(name)
        del self.medium[name]
        self.ledger.delete(name)

    @invariant()
    def the_cap_holds(self) -> None:
        on_medium = sum(self.medium.values()) + sum(self.half_written.values())
        assert on_medium <= self.ledger.used_bytes <= CAP_BYTES

    @invariant()
    def what_is_found_is_there(self) -> None:
        for name in (f"n{number}" for number in range(12)):
            if self.ledger.finds(name):
                assert name in self.medium
        for name in self.reading:
            assert name in self.medium

    @invariant()
    def what_was_condemned_is_never_found_again(self) -> None:
        """Not even a victim that is spared since the write that it made room for has failed."""
        self.condemned &= set(self.medium)
        assert not any(self.ledger.finds(name) for name in self.condemned)

    @invariant()
    def the_accounts_add_up(self) -> None:
        self.ledger.check_integrity()


class S3LedgerMachine(LedgerMachine):
    def policy(self) -> Policy[str]:
        return S3Fifo(lambda name: name)


TestLru = LedgerMachine.TestCase
TestS3Fifo = S3LedgerMachine.TestCase
TestLru.settings = TestS3Fifo.settings = settings(max_examples=60, stateful_step_count=50)


def test_a_smaller_cap_makes_the_oldest_go() -> None:
    ledger = Ledger(cap_bytes=100, policy=Lru())
    for number in range(5):
        ledger.adopt(f"n{number}", 40)
    assert ledger.surplus() == ["n0", "n1", "n2"]
    for number in range(3):
        ledger.delete(f"n{number}")
    assert (ledger.used_bytes, len(ledger)) == (80, 2)
    assert ledger.surplus() == []
    ledger.check_integrity()


def test_what_a_failed_write_left_behind_stays_charged() -> None:
    ledger = Ledger(cap_bytes=100, policy=Lru())
    ledger.adopt("old", 60)
    assert ledger.reserve("new", 80) == ("old",)
    assert ledger.settle("new", deleted=["old"], published_bytes=None, is_stranded=True) == ["new"]
    assert (ledger.used_bytes, ledger.finds("new"), ledger.reserve("next", 30)) == (80, False, None)
    assert ledger.leaving == 1
    ledger.check_integrity()
    ledger.delete("new")
    assert (ledger.used_bytes, ledger.leaving, ledger.reserve("new", 30)) == (0, 0, ())
    ledger.check_integrity()


def test_what_cannot_be_deleted_now_is_no_victim() -> None:
    ledger = Ledger(cap_bytes=100, policy=Lru())
    for name in ("stuck", "old"):
        ledger.adopt(name, 50)
    ledger.is_stuck = lambda name: name == "stuck"
    assert ledger.reserve("new", 50) == ("old",)
    assert ledger.reserve("next", 50) is None
    ledger.check_integrity()
