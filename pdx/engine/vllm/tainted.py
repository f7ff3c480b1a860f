"""Requests whose KV was computed, in part, with weights that have gone: none of it gets a name, or is found again.

vLLM goes on with them, and its own prefix cache knows no epochs: a request that comes later could be given their blocks
there. So that cache forgets what it has when the weights change, and whatever such requests leave behind; and a request
that shares a block with one of them is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class OwnCache(Protocol):
    """The engine's blocks and its own prefix cache."""

    def blocks_of(self, request_id: str) -> set[int]:
        """Those that the request has now."""

    def forget(self, block_ids: Iterable[int] | None) -> None:
        """No request to come finds these there; None: any."""


class Tainted:
    """Owned by the scheduler's thread."""

    def __init__(self) -> None:
        self._own: OwnCache | None = None
        self._requests: set[str] = set()

    def bind(self, own: OwnCache) -> None:
        """The scheduler's, which is made after this."""
        self._own = own

    def begin(self, request_ids: Iterable[str]) -> None:
        """The weights may have changed while these requests were there."""
        self._requests.update(request_ids)
        self._forget(None)

    def admitted(self, request_id: str) -> bool:
        """Whether this request, which has been given blocks now, shares some with tainted ones, or is one itself."""
        if self._requests and request_id not in self._requests and self._own is not None:
            mine = self._own.blocks_of(request_id)
            if any(mine & self._own.blocks_of(other) for other in self._requests):
                self._requests.add(request_id)
        return request_id in self._requests

    def stepped(self, preempted: Iterable[str]) -> None:
        """vLLM has freed the blocks of `preempted`, and admitted nobody since."""
        if self._requests.intersection(preempted):
            self._forget(None)  # nobody says any more which blocks these were
        if self._own is not None:
            for request_id in self._requests:  # now, for blocks behind a window leave them while they run
                self._own.forget(self._own.blocks_of(request_id))

    def finished(self, request_id: str) -> None:
        """Its blocks are about to be freed."""
        if request_id in self._requests:
            self._requests.remove(request_id)
            if self._own is not None:
                self._own.forget(self._own.blocks_of(request_id))

    def _forget(self, block_ids: Iterable[int] | None) -> None:
        if self._own is not None:
            self._own.forget(block_ids)
