"""A device whose streams are queues of closures over real bytes, run in any order that the contract allows.

Two checks. *Order*: each piece of work knows what it certainly comes after (its stream, the events that its stream
waited for, what the host had seen when it enqueued it); two pieces that touch the same bytes, one of them writing, must
be ordered, whatever the scheduler did. *Effect*: nothing runs before the scheduler, or a host that waits, makes it, so
whoever looks too early finds the bytes of before.

The host has two threads, `model` and `completions`; a test without threads says which of them it is with `as_host`.
"""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_64_intdigest

from pdx.engine.streams import Copy
from pdx.errors import DeviceLost
from pdx.layout import PageLayout

Clock = dict[int, int]  # stream -> how much of its queue


class UnorderedAccess(AssertionError):
    """Two pieces of work touch the same bytes and nothing orders them."""


@dataclass(frozen=True)
class Span:
    memory: int  # id of a buffer that this device knows
    start: int
    end: int
    writes: bool

    def clashes(self, other: Span) -> bool:
        touches = self.memory == other.memory and self.start < other.end and other.start < self.end
        return touches and (self.writes or other.writes)


@dataclass(eq=False)
class Work:
    stream: ModelStream
    number: int  # in its stream, from 1
    after: Clock  # itself included
    spans: list[Span]
    step: int  # of the engine, in which it was enqueued
    what: str
    run: Callable[[], None] | None  # None: waits for `event`
    event: ModelEvent | None = None

    def follows(self, other: Work) -> bool:
        return self.after.get(other.stream.number, 0) >= other.number


@dataclass(eq=False)
class ModelStream:
    number: int
    clock: Clock = field(default_factory=dict)
    queue: list[Work] = field(default_factory=list)
    done: int = 0


@dataclass(eq=False)
class ModelEvent:
    stream: ModelStream
    number: int
    clock: Clock


@dataclass(eq=False)
class ModelBlocks:
    block_ids: tuple[int, ...]


class ModelStaging:
    def __init__(self, pages_max: int, page_bytes: int) -> None:
        self.pages_max = pages_max
        self.memory = memoryview(bytearray(pages_max * page_bytes))


@dataclass(eq=False)
class ModelPinned:
    memory: memoryview


class ModelDigests:
    def __init__(self, device: ModelDevice, work: Work, values: list[int]) -> None:
        self._device, self._work, self._values = device, work, values

    def read(self) -> Sequence[int]:
        seen = self._device.seen_by_host()
        assert seen.get(self._work.stream.number, 0) >= self._work.number, "digests read before their event"
        assert self._values
        return self._values


class ModelDevice:
    """Over `caches`: a writable flat buffer per layer. Any thread."""

    def __init__(self, caches: Sequence[memoryview], layout: PageLayout, *, seed: int = 0, eager: bool = False) -> None:
        self.caches = caches
        self.layout = layout
        self.random = random.Random(seed)
        self.eager = eager  # work runs as soon as it may
        self.checks_order = True
        self.starved: set[int] = set()  # streams that move only when somebody waits for them
        self.step = 0  # for whoever asks which step a copy belongs to
        self.lost = False
        self.hangs = threading.Event()  # set: whoever waits, waits for ever (until it is cleared and `wake` is called)
        self.pinned: list[ModelPinned] = []
        self.copies: list[int] = []  # pages of each copy between staging and arena
        self._lock = threading.RLock()
        self._streams = [ModelStream(0)]
        self._touched: dict[int, list[tuple[Work, Span]]] = {}  # by memory
        self._pending: list[Work] = []
        self._host = threading.local()
        self._seen: dict[str, Clock] = {}
        self._release = threading.Event()

    # --- the contract -----------------------------------------------------------------------------------------

    def pin(self, memory: memoryview) -> ModelPinned:
        self._check()
        self.pinned.append(ModelPinned(memory))
        return self.pinned[-1]

    def unpin(self, pinned: ModelPinned) -> None:
        with self._lock:
            assert not self.pending_on(pinned.memory), "an arena is let go under a copy"
            self.pinned.remove(pinned)

    def compute_stream(self) -> ModelStream:
        return self._streams[0]

    def new_stream(self) -> ModelStream:
        self._streams.append(ModelStream(len(self._streams)))
        return self._streams[-1]

    def new_staging(self, pages_max: int) -> ModelStaging:
        return ModelStaging(pages_max, self.layout.page_bytes)

    def record(self, stream: ModelStream) -> ModelEvent:
        self._check()
        with self._lock:
            return ModelEvent(stream, len(stream.queue), dict(stream.clock))

    def wait(self, stream: ModelStream, event: ModelEvent) -> None:
        self._check()
        with self._lock:
            self._enqueue(stream, "wait", [], None, event)

    def reached(self, event: ModelEvent) -> bool:
        self._check()
        with self._lock:
            if event.stream.done < event.number:
                return False
            _join(self.seen_by_host(), event.clock)
            return True

    def synchronize(self, event: ModelEvent) -> None:
        if self.hangs.is_set():
            self._release.wait()
        self._check()
        with self._lock:
            self._force(event)
            _join(self.seen_by_host(), event.clock)

    def block_list(self, stream: ModelStream, block_ids: Sequence[int]) -> ModelBlocks:
        self._check()
        return ModelBlocks(tuple(block_ids))

    def gather(
        self, stream: ModelStream, layer: int, blocks: ModelBlocks, first: int, count: int, staging: ModelStaging
    ) -> ModelDigests:
        return self._pages("gather", stream, layer, blocks, first, count, staging)

    def scatter(
        self, stream: ModelStream, layer: int, blocks: ModelBlocks, first: int, count: int, staging: ModelStaging
    ) -> ModelDigests:
        return self._pages("scatter", stream, layer, blocks, first, count, staging)

    def copy_out(self, stream: ModelStream, staging: ModelStaging, arena: ModelPinned, copies: Sequence[Copy]) -> None:
        for first, pages, offset in copies:
            at = first * self.layout.page_bytes
            self._copy("copy out", stream, (staging.memory, at), (arena.memory, offset), pages)

    def copy_in(self, stream: ModelStream, arena: ModelPinned, staging: ModelStaging, copies: Sequence[Copy]) -> None:
        for first, pages, offset in copies:
            at = first * self.layout.page_bytes
            self._copy("copy in", stream, (arena.memory, offset), (staging.memory, at), pages)

    def copy_straight(
        self, stream: ModelStream, arena: ModelPinned, layer: int, blocks: ModelBlocks, copies: Sequence[Copy]
    ) -> None:
        page_bytes = self.layout.page_bytes
        for first, pages, offset in copies:
            for n, block_id in enumerate(blocks.block_ids[first : first + pages]):
                source, target = (arena.memory, offset + n * page_bytes), (self.caches[layer], block_id * page_bytes)
                self._copy("scatter by copy", stream, source, target, 1)

    def look(self, stream: ModelStream, layer: int, blocks: ModelBlocks, first: int, count: int) -> ModelDigests:
        staging = self.new_staging(count)  # nobody else's
        return self._pages("gather", stream, layer, blocks, first, count, staging)

    def page(self, layer: int, block_id: int) -> bytes:
        self._check()
        span = self._block(layer, block_id, writes=False)
        seen = self.seen_by_host()
        for work, other in self._touched.get(span.memory, ()):
            assert not span.clashes(other) or seen.get(work.stream.number, 0) >= work.number, "a page read too early"
        return bytes(self.caches[layer][span.start : span.end])

    # --- for tests --------------------------------------------------------------------------------------------

    def compute(self, layer: int, pages: dict[int, bytes], reads: Sequence[int] = ()) -> None:
        """The engine's work on one layer: writes pages of blocks, reads others."""
        spans = [self._block(layer, block_id, writes=True) for block_id in pages]
        spans += [self._block(layer, block_id, writes=False) for block_id in reads]

        def run() -> None:
            for block_id, page in pages.items():
                start = block_id * self.layout.page_bytes
                self.caches[layer][start : start + self.layout.page_bytes] = page

        if self.lost:
            return
        with self._lock:
            self._enqueue(self._streams[0], f"compute of layer {layer}", spans, run)

    @contextlib.contextmanager
    def as_host(self, name: str) -> Iterator[None]:
        before = getattr(self._host, "name", None)
        self._host.name = name
        yield
        self._host.name = before

    def seen_by_host(self) -> Clock:
        name = getattr(self._host, "name", None) or threading.current_thread().name
        return self._seen.setdefault(name, {})

    def advance(self, works: int) -> None:
        """Runs up to so many pieces, each the head of some stream that may go on."""
        with self._lock:
            for _ in range(works):
                ready = [s for s in self._streams if s.number not in self.starved and self._may_run(s)]
                if not ready:
                    return
                self._run_head(self.random.choice(ready))

    def finish(self) -> None:
        """Everything."""
        with self._lock:
            for stream in self._streams:
                self._force(ModelEvent(stream, len(stream.queue), {}))

    def lose(self) -> None:
        self.lost = True

    def wake(self) -> None:
        self.hangs.clear()
        self._release.set()

    def pending_on(self, memory: memoryview, start: int = 0, end: int = 1 << 62) -> list[Work]:
        """Work not done that touches these bytes."""
        if self.lost:
            return []
        region = Span(_name(memory), start, end, writes=True)
        self._pending = [work for work in self._pending if work.stream.done < work.number]
        return [work for work in self._pending if any(span.clashes(region) for span in work.spans)]

    def pending_on_block(self, block_id: int) -> list[Work]:
        start = block_id * self.layout.page_bytes
        return [
            work
            for cache in self.caches
            for work in self.pending_on(cache, start, start + self.layout.page_bytes)
            if work.stream is not self._streams[0]
        ]

    # --- inside -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.lost:
            raise DeviceLost("the model was told to fail")

    def _block(self, layer: int, block_id: int, *, writes: bool) -> Span:
        start = block_id * self.layout.page_bytes
        assert 0 <= start <= len(self.caches[layer]) - self.layout.page_bytes
        return Span(_name(self.caches[layer]), start, start + self.layout.page_bytes, writes)

    def _pages(
        self, what: str, stream: ModelStream, layer: int, blocks: ModelBlocks, first: int, count: int,
        staging: ModelStaging,
    ) -> ModelDigests:  # fmt: skip
        self._check()
        page_bytes, cache = self.layout.page_bytes, self.caches[layer]
        assert 0 < count <= staging.pages_max
        assert first + count <= len(blocks.block_ids)
        gathers = what == "gather"
        spans = [self._block(layer, n, writes=not gathers) for n in blocks.block_ids[first : first + count]]
        spans.append(Span(_name(staging.memory), 0, count * page_bytes, gathers))
        values: list[int] = []
        kept = weakref.ref(blocks)

        def run() -> None:
            block_list = kept()
            assert block_list is not None, "a block list was let go before the work that reads it"
            for n, block_id in enumerate(block_list.block_ids[first : first + count]):
                page = cache[block_id * page_bytes : (block_id + 1) * page_bytes]
                place = staging.memory[n * page_bytes : (n + 1) * page_bytes]
                if gathers:
                    place[:] = page
                else:
                    page[:] = place
                values.append(xxh3_64_intdigest(place))

        with self._lock:
            return ModelDigests(self, self._enqueue(stream, f"{what} of layer {layer}", spans, run), values)

    def _copy(
        self, what: str, stream: ModelStream, source: tuple[memoryview, int], target: tuple[memoryview, int], pages: int
    ) -> None:
        self._check()
        size = pages * self.layout.page_bytes
        self.copies.append(pages)
        spans = [Span(_name(memory), at, at + size, memory is target[0]) for memory, at in (source, target)]
        for memory, at in (source, target):
            assert 0 <= at <= len(memory) - size

        def run() -> None:
            assert any(p.memory is memory for p in self.pinned for memory in (source[0], target[0])), "no arena pinned"
            target[0][target[1] : target[1] + size] = source[0][source[1] : source[1] + size]

        with self._lock:
            self._enqueue(stream, what, spans, run)

    def _enqueue(
        self,
        stream: ModelStream,
        what: str,
        spans: list[Span],
        run: Callable[[], None] | None,
        event: ModelEvent | None = None,
    ) -> Work:
        _join(stream.clock, self.seen_by_host())
        if event is not None:
            _join(stream.clock, event.clock)
        number = len(stream.queue) + 1
        stream.clock[stream.number] = number
        work = Work(stream, number, dict(stream.clock), spans, self.step, what, run, event)
        for span in spans if self.checks_order else ():
            self._touch(work, span)
        self._pending.append(work)
        stream.queue.append(work)
        if self.eager:
            self.advance(1 << 30)
        return work

    def _touch(self, work: Work, span: Span) -> None:
        """Raises UnorderedAccess."""
        kept = [(work, span)]
        for earlier, other in self._touched.get(span.memory, ()):
            if earlier is not work and span.clashes(other) and not work.follows(earlier):
                raise UnorderedAccess(f"{work.what} (step {work.step}) and {earlier.what} (step {earlier.step})")
            # Whoever is ordered behind this write is behind all that it covers, too.
            if not (span.writes and span.start <= other.start and other.end <= span.end):
                kept.append((earlier, other))
        self._touched[span.memory] = kept

    def _may_run(self, stream: ModelStream) -> bool:
        if stream.done == len(stream.queue):
            return False
        event = stream.queue[stream.done].event
        return event is None or event.stream.done >= event.number

    def _run_head(self, stream: ModelStream) -> None:
        work = stream.queue[stream.done]
        if work.run is not None:
            work.run()
        work.run = None  # it knows an arena
        stream.done += 1

    def _force(self, event: ModelEvent) -> None:
        """Runs what `event` needs, and nothing else."""
        while event.stream.done < event.number:
            head = event.stream.queue[event.stream.done]
            if head.event is not None:
                self._force(head.event)
            self._run_head(event.stream)


def _join(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def _name(memory: memoryview) -> int:
    return id(memory.obj)
