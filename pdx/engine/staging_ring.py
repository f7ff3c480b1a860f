"""Staging buffers, taken in turn. A buffer that is taken again is waited for on the device, never by the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdx.engine.streams import Device, Event, Staging, Stream


@dataclass(eq=False)
class Buffer:
    staging: Staging
    emptied: Event | None = None  # the last copy out of it is done; None: there was none


class StagingRing:
    """Owned by one thread."""

    def __init__(self, device: Device, *, buffers: int, pages_max: int) -> None:
        self._device = device
        self._buffers: Sequence[Buffer] = [Buffer(device.new_staging(pages_max)) for _ in range(buffers)]
        self._next = 0
        self.pages_max = pages_max

    def take(self, stream: Stream) -> Buffer:
        """The next buffer: what is enqueued in `stream` from now on may fill it. Set `emptied` behind its last use."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffer.emptied is not None:
            self._device.wait(stream, buffer.emptied)
        return buffer
