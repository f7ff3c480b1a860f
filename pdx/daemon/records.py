"""What the mover keeps of each half of a handoff, beside its state machine: places, leases, the channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pdx.buffer.lease import Lease
from pdx.buffer.store import Claim
from pdx.handoff.receiver import Receiver
from pdx.handoff.sender import Sender
from pdx.layout import PageLayout, Place
from pdx.wire import OpenSend, Reserve

HandoffKey = tuple[bytes, int]  # handoff id, attempt


@dataclass(eq=False)
class Outgoing:
    """The sending half: our slots, and where their pages go."""

    key: HandoffKey
    sender: Sender
    request: OpenSend
    engine_id: str
    namespace: bytes
    layout_id: str
    pages: PageLayout
    claim: Claim | None = None
    wire: Lease | None = None  # held while puts may read the slots
    channel: int = -1
    window: int = 0
    targets: dict[int, Place] = field(default_factory=dict)  # block -> place in the receiver's arena


@dataclass(eq=False)
class Incoming:
    """The receiving half. With `paired`, both halves live in this daemon and share the sender's slots."""

    key: HandoffKey
    receiver: Receiver
    reserve: Reserve
    claim: Claim | None = None
    wire: Lease | None = None  # held while puts may write the slots, and until the engine came or won't
    window: int = 0
    paired: Outgoing | None = None

    @property
    def places(self) -> list[Place]:
        source = self.paired.claim if self.paired else self.claim
        return source.places if source else []


@dataclass(eq=False)
class EngineHold:
    """An engine's right to a handoff's slots, until it lets go and its fence has passed."""

    handoff_id: bytes
    side: Literal["send", "load"]
    engine_id: str
    lease: Lease
    incoming: Incoming | None = None
    outgoing: Outgoing | None = None
