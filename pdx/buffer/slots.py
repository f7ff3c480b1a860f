"""A slot: the room for a run of consecutive blocks, and its states.

All that changes a slot's state is `Slot.on`, by the table MOVES, which ARCHITECTURE.md shows. A slot moves only when
the store says so; who holds it is counted here and known to the leases. It reads and writes no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from pdx.buffer.extents import Run
from pdx.errors import IllegalTransition
from pdx.layout import PageLayout, Place

BlockKey = tuple[bytes, bytes]  # (namespace, block hash)
SlotEvent = Literal["claim", "commit", "abandon", "drop", "drain"]


class SlotState(StrEnum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    QUARANTINE = "quarantine"


MOVES: dict[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.FREE, "claim"): SlotState.FILLING,
    (SlotState.FILLING, "commit"): SlotState.READY,
    (SlotState.FILLING, "abandon"): SlotState.QUARANTINE,
    (SlotState.READY, "drop"): SlotState.QUARANTINE,
    (SlotState.QUARANTINE, "drain"): SlotState.FREE,
}


@dataclass(eq=False, slots=True)
class Slot:
    """One life of a run of units: born free, claimed at once, and forgotten when it is free again."""

    run: Run
    generation: int
    keys: tuple[BlockKey | None, ...]  # by position; None for what no lookup may ever find: a tail, a block cleared
    claimed_at: float = 0.0  # on the store's clock
    tenant: bytes = b""  # whose quota it is charged to
    state: SlotState = SlotState.FREE
    holds: int = 0  # leases that have not ended
    copies: int = 0  # those of them that only copy its blocks elsewhere
    indexed: int = 0  # how many of `keys` lead here
    places: tuple[Place, ...] = field(init=False)

    def __post_init__(self) -> None:
        run = self.run
        first_header, step = run.header_offset, run.layout.header_bytes
        self.places = tuple(
            Place(run.offset, run.blocks, position, first_header + position * step, self.generation)
            for position in range(run.blocks)
        )

    @property
    def layout(self) -> PageLayout:
        return self.run.layout

    @property
    def blocks(self) -> int:
        return self.run.blocks

    @property
    def size_bytes(self) -> int:
        """What it takes of the arena, headers aside."""
        return self.blocks * self.layout.unit_bytes

    @property
    def idle(self) -> bool:
        """Nobody's but the index's: may be evicted."""
        return self.state is SlotState.READY and not self.holds

    @property
    def unused(self) -> bool:
        """Idle, or only being copied: nobody has a use for it now."""
        return self.state is SlotState.READY and self.holds == self.copies

    def allows(self, event: SlotEvent) -> bool:
        drains_under_holders = event == "drain" and self.holds
        return (self.state, event) in MOVES and not drains_under_holders

    def unname(self, position: int) -> BlockKey | None:
        """While the slot is being filled: no lookup will ever find this block. Returns the name that it would have had.

        Of a slot that is ready the index forgets.
        """
        if self.state is not SlotState.FILLING:
            return None
        key, self.keys = self.keys[position], (*self.keys[:position], None, *self.keys[position + 1 :])
        return key

    def on(self, event: SlotEvent) -> None:
        """Raises IllegalTransition, changing nothing, if the table or a hold forbids it."""
        if not self.allows(event):
            raise IllegalTransition(f"{event} of {self}")
        self.state = MOVES[self.state, event]

    def __repr__(self) -> str:
        return (
            f"<Slot {self.state} at {self.run.offset:#x}: {self.blocks} blocks, {self.indexed} indexed, "
            f"{self.holds} holds, generation {self.generation}>"
        )
