"""Puts that wait for one channel: whose turn it is, and the next piece of a put. Pure: no threads, sockets or clocks.

Puts of one queue leave in order. Between queues the most urgent goes first, and equals take turns piece by piece; a
queue is as urgent as its latest put says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from pdx.transport.api import Copy

# Far above what handoffs in flight need (layers x chunks of a few hundred prompts); a put beyond it fails at once.
PUTS_MAX = 1 << 16


class Cuttable(Protocol):
    """A put, and how much of it has been cut off."""

    copies: Sequence[Copy]
    copy_index: int
    copied_bytes: int  # of copies[copy_index]


APut = TypeVar("APut", bound=Cuttable)


class Queue(Generic[APut]):
    """Never empty."""

    __slots__ = ("name", "puts", "served_at_turn", "urgency")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.puts: deque[APut] = deque()
        self.urgency = 0.0
        self.served_at_turn = 0

    def rank(self) -> tuple[float, int]:
        return self.urgency, -self.served_at_turn


class Queues(Generic[APut]):
    """Owned by whoever owns the channel."""

    def __init__(self) -> None:
        self._queues: dict[bytes, Queue[APut]] = {}
        self._turn = 0

    def __iter__(self) -> Iterator[APut]:
        return (put for queue in self._queues.values() for put in queue.puts)

    def add(self, name: bytes, put: APut, urgency: float) -> None:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = Queue(name)
        queue.urgency = urgency
        queue.puts.append(put)

    def next(self, passed_over: Collection[bytes] = ()) -> Queue[APut] | None:
        """The queue whose turn it is, but for those that are passed over."""
        if len(self._queues) == 1 and not passed_over:  # the usual case, and asked before every piece
            (queue,) = self._queues.values()
            return queue
        ready = (queue for queue in self._queues.values() if queue.name not in passed_over)
        return max(ready, key=Queue.rank, default=None)

    def take_turn(self, queue: Queue[APut]) -> None:
        """A piece of its first put is cut: then its equals come first."""
        self._turn += 1
        queue.served_at_turn = self._turn

    def end_first(self, name: bytes) -> None:
        """The first put of this queue waits no longer."""
        queue = self._queues[name]
        queue.puts.popleft()
        if not queue.puts:
            del self._queues[name]

    def drop(self, name: bytes) -> list[APut]:
        """Empties one queue. What was in it."""
        queue = self._queues.pop(name, None)
        return list(queue.puts) if queue is not None else []

    def drop_all(self, is_meant: Callable[[APut], bool] = lambda _: True) -> list[APut]:
        """Of all queues. What was in them."""
        dropped: list[APut] = []
        for name, queue in list(self._queues.items()):
            dropped += filter(is_meant, queue.puts)
            queue.puts = deque(put for put in queue.puts if not is_meant(put))
            if not queue.puts:
                del self._queues[name]
        return dropped


def cut(put: Cuttable, *, bytes_max: int, copies_max: int) -> list[Copy]:
    """The next piece of a put, which is cut up once its copy_index is at the end of its copies."""
    copies, index, done_bytes = put.copies, put.copy_index, put.copied_bytes
    last_index = min(len(copies), index + copies_max)
    piece: list[Copy] = []
    while bytes_max and index < last_index:  # once for every span that is sent: what can be outside, is
        copy = copies[index]
        length = copy.length - done_bytes
        is_whole = length <= bytes_max
        if done_bytes or not is_whole:
            length = min(length, bytes_max)
            copy = Copy(copy.source_offset + done_bytes, copy.target_offset + done_bytes, length)
        piece.append(copy)
        bytes_max -= length
        if is_whole:
            index += 1
            done_bytes = 0
        else:
            done_bytes += length
    put.copy_index, put.copied_bytes = index, done_bytes
    return piece
