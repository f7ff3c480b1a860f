from __future__ import annotations

from itertools import count

from pdx.tiers.spill import Spill, WriteMode
from pdx.tiers.tier import Failed, Written


def keys(*names: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"n", name) for name in names]


def test_through_writes_what_is_committed_and_back_what_is_pressed() -> None:
    through, back = Spill(WriteMode.THROUGH), Spill(WriteMode.BACK)
    for spill in (through, back):
        spill.committed(keys(b"a", b"b", b"c"))
    assert (through.wanted(), back.wanted()) == (keys(b"a", b"b", b"c"), [])
    for spill in (through, back):
        spill.pressed(keys(b"c", b"d"))
    assert through.wanted() == keys(b"c", b"d", b"a", b"b")
    assert back.wanted() == keys(b"c", b"d")


def test_a_block_is_written_once_at_a_time() -> None:
    spill = Spill(WriteMode.THROUGH)
    (key,) = keys(b"a")
    spill.committed([key, key])
    spill.submitted(key, 7)
    spill.committed([key])
    spill.pressed([key])
    assert (spill.wanted(), len(spill)) == ([], 1)
    assert spill.on(Failed(7, "full", 28)) == (key, False)
    spill.pressed([key])
    spill.submitted(key, 8)
    assert spill.on(Written(8, 0.1)) == (key, True)
    assert len(spill) == 0


def test_the_backlog_is_bounded_and_the_oldest_wish_is_dropped() -> None:
    spill = Spill(WriteMode.THROUGH, backlog_max=2)
    spill.committed(keys(b"a", b"b", b"c"))
    assert (spill.wanted(), spill.dropped) == (keys(b"b", b"c"), 1)
    spill.gone((b"n", b"b"))
    spill.gone((b"n", b"unknown"))
    assert spill.wanted() == keys(b"c")
    assert repr(spill) == "<Spill through: 1 waiting, 0 open, 1 dropped>"


def test_what_is_pressed_is_not_dropped_for_what_is_not() -> None:
    spill = Spill(WriteMode.THROUGH, backlog_max=2)
    spill.committed(keys(b"a", b"b"))
    spill.pressed(keys(b"c"))
    assert (spill.wanted(), spill.dropped) == (keys(b"c", b"a"), 1)
    spill.committed(keys(b"d"))
    assert (spill.wanted(), spill.dropped) == (keys(b"c", b"a"), 2)
    spill.pressed(keys(b"e", b"f"))
    assert spill.wanted() == keys(b"e", b"f")


def test_what_the_medium_could_not_grant_waits_where_it_was_and_what_failed_itself_behind_it() -> None:
    """The last of those that were withdrawn ends first, as in the disk tier."""
    spill = Spill(WriteMode.THROUGH)
    spill.committed(keys(b"a", b"b", b"c", b"d"))
    for ticket, key in enumerate(keys(b"a", b"b", b"c")):
        spill.submitted(key, ticket)
    for ticket in (2, 1):
        assert spill.on(Failed(ticket, "paused", again=True)) == (keys(b"a", b"b", b"c")[ticket], False)
    spill.on(Failed(0, "full", 28, again=True))
    assert spill.wanted() == keys(b"b", b"c", b"d", b"a")
    assert not any(map(spill.is_refused, spill.wanted()))
    assert len(spill) == 4


def test_only_what_was_pressed_counts_as_written_back() -> None:
    spill = Spill(WriteMode.THROUGH)
    spill.committed(keys(b"a", b"b", b"c", b"d"))
    spill.pressed(keys(b"b", b"c", b"d"))
    spill.gone((b"n", b"c"))
    spill.committed(keys(b"c"))
    for ticket, key in enumerate(keys(b"a", b"b", b"c", b"d")):
        spill.submitted(key, ticket)
    for end in (Written(0, 0.1), Written(1, 0.1), Written(2, 0.1), Failed(3, "full", 28)):
        spill.on(end)
    assert spill.written_back == 1


def test_a_refusal_holds_until_the_block_comes_anew_or_the_tier_is_well_again() -> None:
    spill = Spill(WriteMode.BACK)
    first, second, third = keys(b"a", b"b", b"c")
    for ticket, key in enumerate((first, second)):
        spill.pressed([key])
        assert spill.is_coming(key)
        spill.submitted(key, ticket)
        assert spill.is_coming(key)
        spill.on(Failed(ticket, "full", 28))
        assert not spill.is_coming(key)
    spill.pressed([third])
    spill.refused(third)
    assert spill.wanted() == []
    assert all(map(spill.is_refused, (first, second, third)))
    spill.gone(first)
    assert [spill.is_refused(key) for key in (first, second, third)] == [False, True, True]
    spill.committed([third])
    assert not spill.is_refused(third)
    spill.well()
    assert not spill.is_refused(second)


def test_what_fails_again_while_others_are_written_is_refused_until_it_has_left() -> None:
    spill = Spill(WriteMode.THROUGH)
    bad, good = keys(b"a", b"b")
    spill.committed([bad, good])
    tickets = count()

    def write(key: tuple[bytes, bytes], *, ok: bool) -> None:
        ticket = next(tickets)
        spill.submitted(key, ticket)
        spill.on(Written(ticket, 0.1) if ok else Failed(ticket, "EIO", 5, again=True))

    for _ in range(5):
        write(bad, ok=False)
        assert spill.wanted() == [good, bad], "the whole medium may be full: nothing is said of this block"
    write(good, ok=True)
    write(bad, ok=False)
    spill.well()
    spill.committed([bad])
    assert (spill.wanted(), spill.is_refused(bad)) == ([], True)
    spill.gone(bad)
    spill.committed([bad])
    assert (spill.wanted(), spill.is_refused(bad)) == ([bad], False)
    write(bad, ok=False)
    assert spill.wanted() == [bad], "its failures are counted anew"
