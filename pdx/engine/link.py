"""One process's line to pdxd, with the daemon's comings and goings made visible.

Whatever was agreed with one incarnation of the daemon means nothing to the next: places lie in another arena, handoffs
are unknown. So callers compare `line` with the one they know, and messages to a dead daemon are simply lost.
"""

from __future__ import annotations

import logging

from pdx.client import Attachment, DaemonClient
from pdx.errors import DaemonGone, TooLarge
from pdx.wire import Message

log = logging.getLogger("pdx.engine")


class Link:
    """The client of now, or none. One thread only; no call blocks once the first `client()` has returned."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self.too_large = 0  # messages, or all of a request's, that were not sent because of their size

    def client(self) -> DaemonClient | None:
        """Raises ConfigError, Refused or DaemonGone only on the first call. Unmaps a dead daemon's arena."""
        return self._attachment.client()

    def at(self, epoch: str) -> None:
        """See `Attachment.at`."""
        self._attachment.at(epoch)

    def leave(self) -> None:
        """See `Attachment.leave`."""
        self._attachment.leave()

    def hold(self) -> None:
        """See `Attachment.hold`."""
        self._attachment.hold()

    def let_go(self) -> None:
        """See `Attachment.let_go`."""
        self._attachment.let_go()

    @property
    def line(self) -> tuple[int, int]:
        """The incarnation of the daemon attached to, and our session there; zeros: none. What was agreed on one line
        means nothing on another."""
        client = self.client()
        return (client.attached.daemon.incarnation, client.attached.session) if client is not None else (0, 0)

    @property
    def arena_bytes(self) -> int:
        """Of the daemon's arena; 0 without one."""
        client = self.client()
        return client.attached.arena_bytes if client is not None else 0

    def send(self, message: Message) -> bool:
        """False if there is no daemon to take it, or it is too large for any."""
        client = self.client()
        if client is None:
            return False
        try:
            client.send(message)
        except DaemonGone:
            return False
        except TooLarge as error:
            self.refuse(str(error))
            return False
        return True

    def refuse(self, reason: str) -> None:
        """Counts what is served without pdx because of its size; tells of the first one."""
        if not self.too_large:
            log.warning("served without pdx: %s", reason)
        self.too_large += 1

    def take(self, timeout_s: float = 0.0) -> list[Message]:
        """Messages that have arrived, waiting at most `timeout_s` for the first."""
        client = self.client()
        if client is None:
            return []
        return client.wait(timeout_s) if timeout_s > 0 else client.poll()

    def close(self) -> None:
        self._attachment.close()
