"""One process's line to pdxd, with the daemon's comings and goings made visible.

Whatever was agreed with one incarnation of the daemon means nothing to the next: places lie in another arena, handoffs
are unknown. So callers compare `incarnation` with the one they know, and messages to a dead daemon are simply lost.
"""

from __future__ import annotations

from pdx.client import Attachment, DaemonClient
from pdx.errors import DaemonGone
from pdx.wire import Message


class Link:
    """The client of now, or none. One thread only; no call blocks once the first `client()` has returned."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def client(self) -> DaemonClient | None:
        """Raises ConfigError, Refused or DaemonGone only on the first call. Unmaps a dead daemon's arena."""
        return self._attachment.client()

    def at(self, epoch: str) -> None:
        """See `Attachment.at`."""
        self._attachment.at(epoch)

    def hold(self) -> None:
        """See `Attachment.hold`."""
        self._attachment.hold()

    def let_go(self) -> None:
        """See `Attachment.let_go`."""
        self._attachment.let_go()

    @property
    def incarnation(self) -> int:
        """Of the daemon attached to; 0: none."""
        client = self.client()
        return client.attached.daemon.incarnation if client is not None else 0

    @property
    def arena_bytes(self) -> int:
        """Of the daemon's arena; 0 without one."""
        client = self.client()
        return client.attached.arena_bytes if client is not None else 0

    def send(self, message: Message) -> bool:
        """False if there is no daemon to take it."""
        client = self.client()
        if client is None:
            return False
        try:
            client.send(message)
        except DaemonGone:
            return False
        return True

    def take(self, timeout_s: float = 0.0) -> list[Message]:
        """Messages that have arrived, waiting at most `timeout_s` for the first."""
        client = self.client()
        if client is None:
            return []
        return client.wait(timeout_s) if timeout_s > 0 else client.poll()

    def close(self) -> None:
        self._attachment.close()
