"""The thread that waits for the device, and how long what it is given lives."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

from memory_daemon import MemoryAttachment, MemoryDaemon
from torch_engine import LAYOUT

from pdx.engine.completions import Completions
from pdx.engine.session import Session
from pdx.errors import DeviceLost


class Waits:
    """A device that only waits."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def synchronize(self, event: Any) -> None:
        self.waited.append(event)
        if event == "broken":
            raise DeviceLost("broken")


def test_buffers_of_a_lost_device_stay_until_their_events_have_passed() -> None:
    """What looks like a loss may be none: then launches that were enqueued before still write."""
    device, done = Waits(), list[str]()
    completions = Completions(device)  # type: ignore[arg-type]
    completions.lose(DeviceLost("an allocation has failed"))
    for event in ("first", "broken", "last"):
        then = partial(lambda event: done.append(f"{event}, waited for {device.waited[-1]}"), event)
        completions.put(event, then)  # type: ignore[arg-type]
    completions.close(timeout_s=0.0)
    assert done == [f"{event}, waited for {event}" for event in ("first", "broken", "last")]


def test_a_session_goes_with_its_last_reference() -> None:
    """It maps the arena of a daemon that may be dead, and no collection looks at what vLLM froze at its start."""
    client = MemoryAttachment(MemoryDaemon(LAYOUT, blocks=8)).client()
    assert client is not None
    session = Session(client)  # type: ignore[arg-type]
    gone = weakref.ref(session)
    gc.disable()
    try:
        del session
        assert gone() is None
    finally:
        gc.enable()
