from __future__ import annotations

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
