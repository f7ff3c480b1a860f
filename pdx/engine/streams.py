"""What movement needs of a device: streams, events, staging memory, three kernels, copies. A contract, no code.

Work of one stream runs in its order; work of two streams in any order, unless `wait` puts one behind the other. What
names a stream only enqueues and returns at once. Whatever such a call names (block list, staging, arena) must stay as
it is until an event recorded behind it has been reached. Any call may raise DeviceLost, after which all of them do.

`pdx.engine.device` implements it for CUDA; tests have a model that runs streams in any order the rules allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Copy(NamedTuple):
    """Pages that lie side by side in the arena, and in the staging buffer or block list from `first` on."""

    first: int
    pages: int
    arena_offset: int


class Stream(Protocol):
    """A queue of work on the device."""


class Event(Protocol):
    """A point in a stream's queue."""


class BlockList(Protocol):
    """Engine block ids where the kernels can read them."""


class Staging(Protocol):
    """Device memory for `pages_max` pages side by side."""

    pages_max: int


class Pinned(Protocol):
    """Host memory that the device's copies reach."""


class Digests(Protocol):
    """Digests on their way to the host."""

    def read(self) -> Sequence[int]:
        """xxh3-64 of each page, once an event behind the call that made this has been reached, in whatever stream."""


class Device(Protocol):
    """One accelerator that holds an engine's KV cache. Any thread, but no stream from two threads at once."""

    def pin(self, memory: memoryview) -> Pinned:
        """For copies. May take seconds. The memory must stay mapped until `unpin`. Raises Refused if it can't be."""

    def unpin(self, pinned: Pinned) -> None:
        """Every copy that named it has been reached."""

    def compute_stream(self) -> Stream:
        """On which the engine enqueues its model's work now."""

    def new_stream(self) -> Stream: ...

    def new_staging(self, pages_max: int) -> Staging: ...

    def record(self, stream: Stream) -> Event: ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What is enqueued in `stream` from now on runs after `event`. The host does not wait."""

    def reached(self, event: Event) -> bool: ...

    def synchronize(self, event: Event) -> None:
        """Blocks this thread, without the interpreter's lock, until `event` is reached. Raises DeviceLost."""

    def block_list(self, stream: Stream, block_ids: Sequence[int]) -> BlockList:
        """Ids of blocks of the cache, for use in this stream. Those of one list that is scattered into are distinct:
        the caller's duty. The caller keeps the list until what names it has been reached."""

    def gather(
        self, stream: Stream, layer: int, blocks: BlockList, first: int, count: int, staging: Staging
    ) -> Digests:
        """Pages of `blocks[first : first + count]` in this layer → staging pages 0…, and their digests."""

    def scatter(
        self, stream: Stream, layer: int, blocks: BlockList, first: int, count: int, staging: Staging
    ) -> Digests:
        """Staging pages 0… → pages of `blocks[first : first + count]` in this layer; digests of what was written."""

    def copy_out(self, stream: Stream, staging: Staging, arena: Pinned, copies: Sequence[Copy]) -> None:
        """Staging pages → the arena."""

    def copy_in(self, stream: Stream, arena: Pinned, staging: Staging, copies: Sequence[Copy]) -> None:
        """The arena → staging pages."""

    def copy_straight(
        self, stream: Stream, arena: Pinned, layer: int, blocks: BlockList, copies: Sequence[Copy]
    ) -> None:
        """The arena → pages of `blocks[copy.first : copy.first + copy.pages]` in this layer, without staging."""

    def look(self, stream: Stream, layer: int, blocks: BlockList, first: int, count: int) -> Digests:
        """Digests of pages of `blocks[first : first + count]` in this layer, as they are."""

    def page(self, layer: int, block_id: int) -> bytes:
        """A copy of the engine's page as it is now; the host waits for it. For digest mode only: slow."""
