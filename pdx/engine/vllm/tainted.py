"""Requests whose KV was computed, in part, with weights that have gone: none of it gets a name, or is found again.

vLLM goes on with them, and its own prefix cache knows no epochs: a request that comes later could be given their blocks
there. So that cache forgets what it has when the weights change, and whatever such requests leave behind; and a request
that shares a block with one of them is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

UNSEEN = -1


class OwnCache(Protocol):
    """The engine's blocks and its own prefix cache."""

    def blocks_of(self, request_id: str) -> set[int]:
        """Those that the request has now."""

    def named(self, request_id: str) -> int:
        """How many of them have got a name; another number whenever one more has."""

    def forget(self, block_ids: Iterable[int] | None) -> None:
        """No request to come finds these there; None: any."""


class Tainted:
    """Owned by the scheduler's thread."""

    def __init__(self) -> None:
        self._own: OwnCache | None = None
        self._requests: dict[str, int] = {}  # with how many of their blocks had names when these were forgotten

    def bind(self, own: OwnCache) -> None:
        """The scheduler's, which is made after this."""
        self._own = own

    def begin(self, request_ids: Iterable[str]) -> None:
        """The weights may have changed while these requests were there."""
        self._requests.update(dict.fromkeys(request_ids, UNSEEN))
        self._forget(None)

    def admitted(self, request_id: str) -> bool:
        """Whether this request, which has been given blocks now, shares some with tainted ones, or is one itself."""
        if self._requests and request_id not in self._requests and self._own is not None:
            mine = self._own.blocks_of(request_id)
            if any(mine & self._own.blocks_of(other) for other in self._requests):
                self._requests[request_id] = UNSEEN
        return request_id in self._requests

    def stepped(self, preempted: Iterable[str]) -> None:
        """vLLM has freed the blocks of `preempted`, and admitted nobody since."""
        again = self._requests.keys() & set(preempted)
        if again:
            self._forget(None)  # nobody says any more which blocks these were
            self._requests.update(dict.fromkeys(again, UNSEEN))
        if self._own is None:
            return
        for request_id, before in self._requests.items():
            named = self._own.named(request_id)
            if named != before:  # now, for blocks behind a window leave them while they run
                self._requests[request_id] = named
                self._own.forget(self._own.blocks_of(request_id))

    def finished(self, request_id: str) -> None:
        """Its blocks are about to be freed."""
        if request_id in self._requests:
            del self._requests[request_id]
            if self._own is not None:
                self._own.forget(self._own.blocks_of(request_id))

    def _forget(self, block_ids: Iterable[int] | None) -> None:
        if self._own is not None:
            self._own.forget(block_ids)
