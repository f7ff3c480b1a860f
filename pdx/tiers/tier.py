"""The tier contract. Knows keys, buffers and tickets; nothing of slots, layouts, leases or what a block means.

The unit is one block: hits are found block by block, so a larger unit would be read for parts of it, and one block is
large enough (2 MiB and more for models worth caching) that opening a file for it costs a tenth of reading it. A block
travels as its pages, wherever in the arena they lie, with `meta`: opaque bytes (checksums, layout) kept beside them.

A tier owns the buffers of a request from submit() until the request's one end: Written or Failed for a Write, Loaded,
Missed or Failed for a Read. What a Read's buffers contain is defined only after Loaded, and then it is what was written
under that key, whatever the medium did in between.

Threads: all methods are called by the one thread that made the tier (the daemon's control thread) and never block on
the medium. Tiers have threads of their own; what they have to say waits in take_events().
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec

Key = tuple[bytes, bytes]  # (namespace, block hash), as in the index

# 1,024 layers with checksums and digests are 40 KiB.
META_BYTES_MAX = 60 << 10
KEY_PART_BYTES_MAX = 255


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Keep these bytes. The same key always means the same bytes: a block the tier has already is not written again."""

    key: Key
    pages: Sequence[memoryview]
    meta: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Bring this block back into these buffers, whose total length is that of the pages written."""

    key: Key
    pages: Sequence[memoryview]


Request = Write | Read


class Written(msgspec.Struct, frozen=True):
    """The block is found from now on. `seconds` of the medium's time; 0 if it was there already."""

    ticket: int
    seconds: float


class Loaded(msgspec.Struct, frozen=True):
    """The buffers hold the block, verified."""

    ticket: int
    meta: bytes
    seconds: float


class Missed(msgspec.Struct, frozen=True):
    """The tier does not have the block, or no longer: unknown, evicted, rotten or unreadable."""

    ticket: int
    reason: str


class Failed(msgspec.Struct, frozen=True):
    """Refused, cancelled or not possible now. `errno` is 0 where no system call failed.

    `again`: not for what was asked for, but since the medium takes no writes now; ask again when it does.
    """

    ticket: int
    reason: str
    errno: int = 0
    again: bool = False


class StateChanged(msgspec.Struct, frozen=True):
    """The tier's health: "well", "paused" (reads only), "hung" (finds nothing now) or "off" (nothing any more).

    Behind a pause it is "trying", which is told in stats() only: it takes one write at a time, until one has gone well.
    """

    state: str
    reason: str
    errno: int = 0


End = Written | Loaded | Missed | Failed
Event = End | StateChanged


@dataclass(frozen=True, slots=True)
class TierStats:
    """Gauges, then counters since the tier was opened."""

    state: str
    blocks: int
    used_bytes: int  # of `cap_bytes`; never more
    cap_bytes: int
    open_reads: int
    open_writes: int
    loaded: int = 0
    missed: int = 0
    written: int = 0
    failed: int = 0
    evicted: int = 0
    refused: int = 0  # submits answered with None
    bad_blocks: int = 0  # found rotten, and deleted
    io_errors: int = 0
    changes: int = 0  # grows with all that may make contains() say something else
    errno: int = 0  # of the call behind the last change of its state, if one failed
    unaligned: int = 0  # requests that the medium could not take straight from or into the buffers


@runtime_checkable
class Watched(Protocol):
    """What a tier can do that knows its names."""

    def watch(self, told: Callable[[str, bool], None], told_all: Callable[[bool], None]) -> list[str]:
        """The names of all blocks that it has. From now on `told` hears, on the thread that calls the tier, of each
        name that it has (True) or no longer has; and `told_all` when contains() finds none of them any more (False),
        at once if that is so now, or all of them again. One watcher."""


@runtime_checkable
class Ordered(Protocol):
    """What a tier can do that evicts in the order of use."""

    def used(self, chain: Sequence[Key]) -> None:
        """These, in chain order, were used now, if only above: a Read by itself is no use, for it says nothing of the
        chain. Of those that contains() finds the last are evicted first, and all after what was used before."""


class Tier(Protocol):
    """One place where blocks are kept."""

    def fileno(self) -> int:
        """Readable while take_events() has something to say."""

    def submit(self, request: Request) -> int | None:
        """A ticket that ends exactly once; or None, with nothing taken, while too many are open: ask again later.

        Raises ClosedTier after close, ValueError for a request that no tier could keep.
        """

    def cancel(self, ticket: int) -> None:
        """Ends the request soon: in Failed if it had not begun, else in any way. Unknown tickets: no-op."""

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """For each key whether a Read submitted now would find it. Never wrong about a block that was never written."""

    def remove(self, key: Key) -> None:
        """No Read submitted from now on finds it. Unknown keys: no-op."""

    def take_events(self) -> list[Event]:
        """Everything that happened since the last call. Never blocks."""

    def stats(self) -> TierStats: ...

    def close(self, *, drain_s: float) -> None:
        """Goes on for at most `drain_s`, then drops what has not begun. Idempotent. Ends can still be taken; the
        buffers of a request without an end (a medium that hangs) are never safe to reuse."""
