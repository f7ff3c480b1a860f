"""What a caller gets for a prompt: places for its blocks, and the lease that keeps them. Values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from pdx.buffer.lease import Lease
from pdx.buffer.slots import Slot
from pdx.layout import Place


@dataclass(frozen=True, eq=False, slots=True)
class Claim:
    """Room for a whole prompt. The lease holds all of its slots, those to be filled and those found ready."""

    lease: Lease
    places: tuple[Place, ...]  # of all blocks in order, the tail last
    fresh: frozenset[int]  # indexes into `places` that are to be filled; the others are ready
    tail: bool  # the last place is a tail: in a slot of its own, never indexed
    fresh_slots: tuple[Slot, ...]


@dataclass(frozen=True, eq=False, slots=True)
class ReadClaim:
    """Ready blocks, from the prompt's start on."""

    lease: Lease
    places: tuple[Place, ...]
