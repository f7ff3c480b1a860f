"""What a handoff machine wants done. The driver (daemon.mover, or a simulator) does it, in order."""

from __future__ import annotations

import msgspec

from pdx.wire import Message


class Action(msgspec.Struct, frozen=True):
    """Base of all actions."""


class ToPeer(Action):
    """Send this to the other daemon of the handoff."""

    message: Message


class ToEngine(Action):
    """Send this to the engine of this side."""

    message: Message


class Put(Action):
    """Put one layer of these blocks into the granted window; answer with `put_ended`, exactly once."""

    layer: int
    blocks: tuple[int, ...]


class StopPuts(Action):
    """Drop what is not on the wire yet. Every put still ends in `put_ended`."""


class Publish(Action):
    """Every page of the fresh blocks is filled and checked: they are ready, and full ones may be found by hash."""


class Abandon(Action):
    """The fresh blocks will never be whole: take the claim back (to quarantine while anybody holds it)."""


class SendCommit(Action):
    """All pages are out: send COMMIT with the checksum over the pages that were put."""

    pages: int


class CheckCommit(Action):
    """Compare `expected` with the checksum over the wanted pages; answer with `checked`."""

    expected: int


class CloseWindow(Action):
    """Close the window; answer with `window_closed`."""


class RevokeEngine(Action):
    """The engine has lost its right to this handoff's slots; its hold stays until it lets go or dies."""


class Ended(Action):
    """The network side touches the slots no more. Forget this half, but keep its id as a tombstone.

    `reason` is empty for a handoff that settled.
    """

    reason: str
