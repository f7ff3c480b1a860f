"""What a handoff machine wants done. The driver (daemon.sending and .receiving, or a simulator) does it, in order."""

from __future__ import annotations

import msgspec

from pdx.wire import Message


class Action(msgspec.Struct, frozen=True):
    """Base of all actions."""


class ToPeer(Action, frozen=True):
    """Send this to the other daemon of the handoff."""

    message: Message


class ToEngine(Action, frozen=True):
    """Send this to the engine of this side."""

    message: Message


class Put(Action, frozen=True):
    """Put one layer of these blocks into the granted window; answer with `put_ended`, exactly once."""

    layer: int
    blocks: tuple[int, ...]


class StopPuts(Action, frozen=True):
    """Drop what is not on the wire yet. Every put still ends in `put_ended`."""


class Publish(Action, frozen=True):
    """Every page of the fresh blocks is filled and checked: they are ready, and full ones may be found by hash."""


class Abandon(Action, frozen=True):
    """The fresh blocks will never be whole: take the claim back (to quarantine while anybody holds it)."""


class SendCommit(Action, frozen=True):
    """All pages are out: send COMMIT with the checksum over the pages that were put."""

    pages: int


class CheckCommit(Action, frozen=True):
    """Compare `expected` with the checksum over the wanted pages; answer with `checked`."""

    expected: int


class CloseWindow(Action, frozen=True):
    """Close the window; answer with `window_closed`."""


class RevokeEngine(Action, frozen=True):
    """The engine has lost its right to this handoff's slots; its hold stays until it lets go or dies."""


class Ended(Action, frozen=True):
    """The network side touches the slots no more. Forget this half, but keep its id as a tombstone.

    `reason` is empty for a handoff that settled.
    """

    reason: str
