"""A policy's order of all idle slots, and beside it orders of some: those that have something in common.

Each is the same policy's, over what it was told. Which are kept is the business of who derives from this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from pdx.buffer.evict import Policy
from pdx.buffer.slots import Slot

Key = TypeVar("Key")


class Beside(Generic[Key]):
    """See Policy: what it says is everybody's order."""

    def __init__(self, everybody: Policy[Slot], key: Callable[[Slot], Key]) -> None:
        """`key`: what slots of one order have in common."""
        self._everybody = everybody
        self._key = key
        self._own: dict[Key, Policy[Slot]] = {}

    def touched(self, chain: Sequence[Slot]) -> None:
        self._everybody.touched(chain)

    def grown(self, chain: Sequence[Slot]) -> None:
        self._everybody.grown(chain)
        for slot in reversed(chain) if self._own else ():
            if (own := self._own_of(slot)) is not None:
                own.grown([slot])

    def removed(self, slot: Slot) -> None:
        self._everybody.removed(slot)
        if (own := self._own_of(slot)) is not None:
            own.removed(slot)

    def forgotten(self, slot: Slot) -> None:
        self._everybody.forgotten(slot)
        if (own := self._own_of(slot)) is not None:
            own.forgotten(slot)

    def evicted(self, slot: Slot) -> None:
        self._everybody.evicted(slot)
        if (own := self._own_of(slot)) is not None:
            own.evicted(slot)

    def another(self) -> Policy[Slot]:
        return self._everybody.another()

    def victims(self) -> Iterator[Slot]:
        return self._everybody.victims()

    def orders(self) -> Iterator[tuple[Key, Policy[Slot]]]:
        """All that are kept beside everybody's."""
        return iter(self._own.items())

    def _own_of(self, slot: Slot) -> Policy[Slot] | None:
        return self._own.get(self._key(slot)) if self._own else None

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._everybody)

    def __len__(self) -> int:
        return len(self._everybody)
