"""Handoffs whose prefill is awaited, and the word from a daemon that one has failed. Owned by the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Pending:
    """One future per handoff; it gets the reason when the handoff fails."""

    def __init__(self) -> None:
        self._failures: dict[bytes, asyncio.Future[str]] = {}

    @contextmanager
    def watch(self, handoff_id: bytes) -> Iterator[asyncio.Future[str]]:
        failure = self._failures[handoff_id] = asyncio.get_running_loop().create_future()
        try:
            yield failure
        finally:
            failure.cancel()
            del self._failures[handoff_id]

    def failed(self, handoff_id: bytes, reason: str) -> None:
        """Both daemons may say so; ids of other routers, or of requests that are over, are none of our business."""
        failure = self._failures.get(handoff_id)
        if failure is not None and not failure.done():
            failure.set_result(reason)
