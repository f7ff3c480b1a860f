"""A lease: one holder's bounded right to slots, and its states. Pure: time comes in, nothing goes out.

Expiry takes the right and keeps the holds: only who can no longer touch the slots (it acknowledged past its fence, its
process is dead, its window is closed) is *quiet*, and only then may its slots be used again. The store counts holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import msgspec

from pdx.buffer.slots import Slot
from pdx.errors import IllegalTransition

LeaseEvent = Literal["release", "expire", "quiesce"]


class LeaseState(StrEnum):
    LIVE = "live"
    QUARANTINED = "quarantined"
    ENDED = "ended"


MOVES: dict[tuple[LeaseState, LeaseEvent], LeaseState] = {
    (LeaseState.LIVE, "release"): LeaseState.ENDED,
    (LeaseState.LIVE, "expire"): LeaseState.QUARANTINED,
    (LeaseState.QUARANTINED, "quiesce"): LeaseState.ENDED,
}


class Owner(msgspec.Struct, frozen=True):
    """Who must fall quiet before the slots are free: an engine session, a wire end, or a verb of an operator."""

    kind: Literal["session", "wire", "verb"]
    name: str


@dataclass(eq=False, slots=True)
class Lease:
    """Slots are distinct and in chain order. `expires_at` is in seconds of the owner thread's monotonic clock."""

    lease_id: int
    owner: Owner
    slots: tuple[Slot, ...]
    expires_at: float
    is_use: bool = True  # False: its holder only copies the blocks elsewhere
    state: LeaseState = LeaseState.LIVE

    def renew(self, expires_at: float) -> bool:
        """Never shortens. False, changing nothing, if the lease is no longer live: its right does not come back."""
        if self.state is not LeaseState.LIVE:
            return False
        self.expires_at = max(self.expires_at, expires_at)
        return True

    def on(self, event: LeaseEvent) -> None:
        """Raises IllegalTransition, changing nothing, if the table forbids it."""
        if (self.state, event) not in MOVES:
            raise IllegalTransition(f"{event} of {self}")
        self.state = MOVES[self.state, event]

    def __repr__(self) -> str:
        return f"<Lease {self.lease_id} {self.state}: {self.owner.kind} {self.owner.name}, {len(self.slots)} slots>"
