"""What is to be done once the device has got so far: one after the other, in a thread that sleeps on the device.

Knows events and callables. When the device is lost every callable still runs, once, and finds `lost` set; behind its
event all the same, for with it go buffers which the device may yet write: not all that looks like a loss is one.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from pdx.engine.streams import Device, Event
from pdx.errors import DeviceLost

log = logging.getLogger("pdx.engine")

Then = Callable[[], None]


class Completions:
    """`put` and `close` belong to the model's thread; the callables run in the other. `lost` and `lose`: any."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._items: queue.SimpleQueue[tuple[Event | None, Then] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.lost = False

    def start(self) -> None:
        """Without it, nothing is done unless somebody calls `work`."""
        self._thread = threading.Thread(target=self._run, name="pdx-copies")
        self._thread.daemon = True  # a device that hangs must not keep the process
        self._thread.start()

    def put(self, event: Event | None, then: Then) -> None:
        """`then` runs when `event` has been reached, behind everything put before."""
        self._items.put((event, then))

    def work(self) -> bool:
        """Does what is next, waiting for it. False once closed."""
        item = self._items.get()
        if item is None:
            return False
        event, then = item
        if event is not None:
            try:
                self._device.synchronize(event)
            except DeviceLost as error:
                self.lose(error)
        then()
        return True

    def lose(self, error: Exception) -> None:
        """Nothing that is under way counts any more, nor anything that comes."""
        if not self.lost:
            self.lost = True
            log.error("KV is neither saved nor loaded any more: %s", error)

    def close(self, *, timeout_s: float) -> bool:
        """Does what has been put, then ends the thread. False if that takes longer: it goes on by itself."""
        self._items.put(None)
        if self._thread is None:
            while self.work():
                pass
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self.work():
                pass
        except BaseException as error:
            self.lose(error if isinstance(error, Exception) else DeviceLost(str(error)))
            raise
