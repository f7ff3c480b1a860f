"""One attachment to a daemon, for as long as the device's copies touch its arena: longer than its client, perhaps.

Has views of the arena and a voice of its own, so the arena stays mapped, and the daemon sees the connection open, until
the last copy is done.
"""

from __future__ import annotations

import logging

from pdx.buffer.headers import Headers
from pdx.client import DaemonClient
from pdx.engine.fence import Fence
from pdx.engine.header_words import HeaderWords
from pdx.engine.streams import Device, Pinned
from pdx.errors import DaemonGone, DeviceLost, Refused
from pdx.wire import Message

log = logging.getLogger("pdx.engine")


class Session:
    """Made by the model's thread. Only the thread of completions speaks, pins and releases."""

    def __init__(self, client: DaemonClient) -> None:
        """The client must have an arena."""
        assert client.arena is not None
        self.incarnation = client.attached.daemon.incarnation
        self.digest_mode = client.attached.digest_mode
        self.headers = Headers(client.arena.memory[:])
        self.words = HeaderWords(self.headers.memory)
        self.arena: Pinned | None = None  # until it is pinned nothing moves
        self.refused = False  # it never will be
        self.left = False  # the daemon is gone, or another one has come: what is still copied counts for nothing
        self._voice = client.voice()
        # Not by way of `self`: in a circle of references the arena would stay mapped until a collection, and vLLM
        # freezes what it has made at its start.
        headers, offset = self.headers, client.attached.fence_offset
        self.fence = Fence(lambda step: headers.set_fence(offset, step))

    def pin(self, device: Device) -> None:
        try:
            self.arena = device.pin(self.headers.memory)
        except (Refused, DeviceLost) as error:
            self.refused = True
            log.error("KV is neither saved nor loaded with this pdxd: %s", error)

    def tell(self, message: Message) -> bool:
        """False if nobody heard it."""
        try:
            self._voice.send(message)
        except DaemonGone:
            return False
        return True

    def finish_telling(self, *, timeout_s: float) -> None:
        self._voice.finish_sending(timeout_s=timeout_s)

    def release(self, device: Device) -> None:
        """No copy is under way. The mapping goes with the last object that knows this session."""
        if self.arena is not None:
            try:
                device.unpin(self.arena)
            except DeviceLost as error:
                # Copies may be under way: as long as this voice is open the daemon gives these slots to nobody.
                log.error("the arena stays pinned: %s", error)
                return
            self.arena = None
        self._voice.close()
