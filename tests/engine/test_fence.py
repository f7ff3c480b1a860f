"""Fence: never goes down, never passes a step with a copy under way, and gets there in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdx.engine.fence import Fence


def test_the_oldest_copy_under_way_holds_it_back() -> None:
    told: list[int] = []
    fence = Fence(told.append)
    fence.hold(1)
    fence.hold(1)
    fence.ended(1)
    fence.hold(2)
    fence.ended(2)
    fence.release(2)
    fence.release(1)
    assert told == []
    fence.release(1)
    assert told == [2]
    fence.ended(3)
    assert told == [2, 3]


@given(st.lists(st.integers(0, 3), max_size=30), st.randoms(use_true_random=False))
def test_any_order(copies: list[int], order: object) -> None:
    """`copies`: how many each step begins; they end in any order, between and behind the steps."""
    told: list[int] = []
    fence = Fence(told.append)
    under_way: list[int] = []

    def look() -> None:
        assert told == sorted(set(told))
        assert not told or all(step > told[-1] for step in under_way)

    for step, count in enumerate(copies, start=1):
        for _ in range(count):
            fence.hold(step)
            under_way.append(step)
        fence.ended(step)
        while under_way and order.random() < 0.5:  # type: ignore[attr-defined]
            fence.release(under_way.pop(order.randrange(len(under_way))))  # type: ignore[attr-defined]
            look()
        look()
    while under_way:
        fence.release(under_way.pop())
        look()
    assert told[-1:] == ([len(copies)] if copies else [])
