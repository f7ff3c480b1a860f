"""What a prompt finds: holdings in order, after gaps, over restarts; and what is only expected."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from engine_fakes import daemon_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.router.choice import knowledge as bounds
from pdx.router.choice.knowledge import EXPECTED_S, Found, Knowledge
from pdx.wire import ARENA_BIT, DISK_BIT, Holdings

BOTH = ARENA_BIT | DISK_BIT


def holdings(number: int, tiers: dict[int, int], *, daemon: str = "d0", incarnation: int = 1) -> Holdings:
    names = struct.pack(f">{len(tiers)}Q", *tiers)
    return Holdings(daemon_id=daemon, incarnation=incarnation, number=number, names=names, tiers=bytes(tiers.values()))


def test_leading_blocks_by_tier() -> None:
    knowledge = Knowledge()
    assert knowledge.on_holdings(holdings(0, {1: ARENA_BIT, 2: BOTH, 3: DISK_BIT, 4: ARENA_BIT, 6: BOTH}))
    assert knowledge.on_holdings(holdings(0, {1: DISK_BIT}, daemon="d1"))
    assert knowledge.found([1, 2, 3, 4, 5, 6], 0.0) == {"d0": Found(4, 2, 2), "d1": Found(1, 0, 0)}
    assert knowledge.found([9, 1, 2], 0.0) == {}, "behind a gap nothing is of use"
    assert knowledge.found([], 0.0) == {}
    assert knowledge.on_holdings(holdings(1, {2: 0}))
    assert knowledge.found([1, 2, 3], 0.0) == {"d0": Found(1, 1, 1), "d1": Found(1)}


def test_after_a_gap_nothing_counts_until_all_was_told_anew() -> None:
    knowledge = Knowledge()
    knowledge.on_holdings(holdings(0, {1: ARENA_BIT}))
    assert not knowledge.on_holdings(holdings(2, {2: ARENA_BIT}))
    assert knowledge.found([1], 0.0) == {}
    assert not knowledge.on_holdings(holdings(3, {2: ARENA_BIT})), "it is the next one, of nothing"
    assert knowledge.on_holdings(holdings(0, {2: ARENA_BIT}))
    assert knowledge.found([2], 0.0) == {"d0": Found(1, 1, 1)}
    knowledge.check_integrity()


def test_an_announcement_shows_what_was_missed() -> None:
    knowledge, ref = Knowledge(), daemon_ref("d0")
    assert knowledge.on_announce(ref, 0), "there is nothing to know"
    assert not knowledge.on_announce(ref, 3), "a router that came later"
    knowledge.on_holdings(holdings(0, {1: ARENA_BIT}))
    assert knowledge.on_announce(ref, 1)
    assert knowledge.found([1], 0.0)
    assert knowledge.on_announce(ref, 0), "it begins anew by itself"
    assert knowledge.found([1], 0.0) == {}


def test_a_daemon_of_another_life_has_nothing() -> None:
    knowledge = Knowledge()
    knowledge.on_holdings(holdings(0, {1: ARENA_BIT}))
    assert not knowledge.on_holdings(holdings(1, {1: ARENA_BIT}, incarnation=2))
    knowledge.on_holdings(holdings(0, {1: ARENA_BIT}))
    assert not knowledge.on_announce(daemon_ref("d0", 2), 1)
    assert knowledge.found([1], 0.0) == {}
    knowledge.on_holdings(holdings(0, {1: ARENA_BIT}))
    knowledge.gone("d0")
    assert knowledge.found([1], 0.0) == {}


def test_what_was_sent_somewhere_is_expected_there_for_a_while() -> None:
    knowledge = Knowledge()
    knowledge.expect([1, 2, 3], daemon_ref("d0"), 0.0)
    assert knowledge.found([1, 2, 3, 4], 1.0) == {"d0": Found(3, 3)}
    knowledge.on_holdings(holdings(0, {1: ARENA_BIT, 2: ARENA_BIT}))
    assert knowledge.found([1, 2, 3, 4], 1.0) == {"d0": Found(3, 3, 2)}
    assert knowledge.found([1, 2, 3, 4], EXPECTED_S + 1.0) == {"d0": Found(2, 2, 2)}
    knowledge.expect([2, 3], daemon_ref("d1"), 2.0)
    assert knowledge.found([1, 2, 3], 3.0) == {"d0": Found(2, 2, 2)}, "the last word counts"


def test_too_many_daemons_cost_the_oldest_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DAEMONS_MAX", 3)
    knowledge = Knowledge()
    for number in range(9):
        assert knowledge.on_holdings(holdings(0, {1: ARENA_BIT}, daemon=f"d{number}"))
    knowledge.expect([1], daemon_ref("d9"), 0.0)
    assert set(knowledge.found([1], 1.0)) == {"d7", "d8", "d9"}
    assert not knowledge.on_holdings(holdings(1, {2: ARENA_BIT}, daemon="d6")), "a live one tells all anew"
    knowledge.check_integrity()


DAEMONS = ("d0", "d1", "d2")
TOLD = st.dictionaries(st.sampled_from(DAEMONS), st.dictionaries(st.integers(1, 8), st.integers(0, 3)), max_size=3)


@settings(max_examples=60)
@given(st.lists(TOLD, max_size=4), st.sets(st.sampled_from(DAEMONS), max_size=1))
def test_found_is_what_one_would_count_by_hand(rounds: list[dict[str, dict[int, int]]], left: set[str]) -> None:
    knowledge, truth = Knowledge(), {daemon: dict[int, int]() for daemon in DAEMONS}
    numbers = dict.fromkeys(DAEMONS, 0)
    for told in rounds:
        for daemon, tiers in told.items():
            assert knowledge.on_holdings(holdings(numbers[daemon], tiers, daemon=daemon))
            numbers[daemon] += 1
            truth[daemon] |= tiers
    for daemon in left:
        knowledge.gone(daemon)
        truth[daemon] = {}
    knowledge.check_integrity()
    names = list(range(1, 9))
    expected = {}
    for daemon, tiers in truth.items():
        blocks = _leading(tiers.get(name, 0) for name in names)
        if blocks:
            here = _leading(tiers.get(name, 0) & ARENA_BIT for name in names)
            expected[daemon] = Found(blocks, here, here)
    assert knowledge.found(names, 0.0) == expected


def _leading(marks: Any) -> int:
    count = 0
    for mark in marks:
        if not mark:
            break
        count += 1
    return count
