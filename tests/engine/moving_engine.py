"""An engine on the model of a device: saves and loads at random, with the real worker side, and sees what is wrong.

Its forward pass only writes random pages. Like vLLM with async scheduling it goes on at once: blocks that were saved in
a step are zeroed, given away and overwritten in the next one, whatever the device has done by then.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from memory_daemon import Clock, Handoff, MemoryAttachment, MemoryDaemon, steady
from stream_model import ModelDevice
from xxhash import xxh3_64_intdigest

from pdx.buffer.headers import Headers
from pdx.engine.device_mover import DeviceMover
from pdx.engine.link import Link
from pdx.engine.vllm.caches import Layers
from pdx.engine.vllm.steps import Load, LoadResult, Save, Step
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.layout import PageLayout, Place
from pdx.wire import Filled, LetGo, Message

LAYOUT = PageLayout(layers=3, page_bytes=48, chunk_blocks=4)
BLOCKS = 24
# Piecewise graphs, layers without hooks, full graphs, two micro-batches, a draft layer behind the forward pass.
HOOKS = ("all", "some", "none", "twice", "late")


class WatchfulDaemon(MemoryDaemon):
    """Looks into the arena whenever a worker says that something is there."""

    def __init__(self, layout: PageLayout, *, blocks: int, incarnation: int = 1, digest_mode: bool = False) -> None:
        super().__init__(layout, blocks=blocks, incarnation=incarnation, digest_mode=digest_mode)
        self.expected: dict[tuple[bytes, int, int], bytes] = {}  # (handoff, block, layer)
        self._handoffs = 0

    def offer(self, sizes: Sequence[int]) -> bytes:
        """A handoff with places in slots of these sizes."""
        self._handoffs += 1
        handoff_id = self._handoffs.to_bytes(16, "big")
        self.handoffs[handoff_id] = Handoff(None, self.places(sizes))  # type: ignore[arg-type]
        return handoff_id

    def places(self, sizes: Sequence[int]) -> list[Place]:
        found = []
        for size in sizes:
            units = [self._claim() for _ in range(size)]
            found += [
                Place(units[0].slot_offset, size, n, unit.header_offset, unit.generation)
                for n, unit in enumerate(units)
            ]
        return found

    def take(self, client: object, message: Message) -> None:
        super().take(client, message)  # type: ignore[arg-type]
        match message:
            case Filled():
                assert message.step > self.arena.fence(0), "a slot was written behind its fence"
                for entry in message.entries:
                    assert not self.handoffs[entry.handoff_id].let_go, "FILLED came behind LET_GO"
                    for block in entry.blocks:
                        self.check_page(entry.handoff_id, block, message.layer)
            case LetGo(ok=True):
                for block in range(len(self.handoffs[message.handoff_id].places)):
                    for layer in range(self.layout.layers):
                        self.check_page(message.handoff_id, block, layer)

    def check_page(self, handoff_id: bytes, block: int, layer: int) -> None:
        place, page = self.handoffs[handoff_id].places[block], self.expected[handoff_id, block, layer]
        start = place.page_offset(self.layout, layer)
        assert self.arena.memory[start : start + self.layout.page_bytes] == page, "told before it was there"
        assert self.arena.checksum(place, layer) == xxh3_64_intdigest(page)

    def check_watermarks(self) -> None:
        for handoff_id, handoff in self.handoffs.items():
            for block, place in enumerate(handoff.places):
                for layer in range(self.arena.watermark(place.header_offset)):
                    self.check_page(handoff_id, block, layer)


@dataclass(eq=False)
class Sending:
    handoff_id: bytes
    places: list[Place]
    pages: list[list[bytes]]  # by block and layer
    next: int = 0
    block_ids: dict[int, int] = field(default_factory=dict)  # of blocks computed and not given back


@dataclass(eq=False)
class Receiving:
    arena: Headers
    places: list[Place]
    pages: list[list[bytes]]
    block_ids: list[int]
    landed: list[int]  # layers of each block
    result: LoadResult | None = None
    invalid: set[int] = field(default_factory=set)


class MovingEngine:
    """`step` is one turn. `random` decides what is in it."""

    def __init__(
        self,
        seed: int,
        daemon: WatchfulDaemon,
        *,
        device: ModelDevice | None = None,
        layout: PageLayout = LAYOUT,
        staging_pages: int = 4,
        threaded: bool = False,
        **options: float,
    ) -> None:
        self.random = random.Random(seed)
        self.daemon = daemon
        self.layout = layout
        self.memory = [memoryview(bytearray(BLOCKS * layout.page_bytes)) for _ in range(layout.layers)]
        self.device = device or ModelDevice(self.memory, layout, seed=seed)
        self.device.caches = self.memory
        self.line = MemoryAttachment(daemon)
        link = Link(self.line)  # type: ignore[arg-type]
        self.mover = DeviceMover(
            self.device, layout, link.client(), staging_bytes=staging_pages * layout.page_bytes, threaded=threaded,
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
        layers = Layers({f"layer.{n}": n for n in range(layout.layers)}, (0,) * layout.layers)
        self.clock = Clock()
        self.worker = WorkerSide(link, layers, layout, self.mover, watch=steady(), clock=self.clock)
        self.number = 0
        self.free = list(range(1, BLOCKS))
        self.dirty: set[int] = set()  # given back: somebody else's from the next step on
        self.sending: list[Sending] = []
        self.receiving: dict[str, Receiving] = {}
        self.over: list[Receiving] = []
        self.finishing: list[str] = []
        self.dropping: list[str] = []
        self._fence_seen = 0

    # --- requests ---------------------------------------------------------------------------------------------

    def send(self, sizes: Sequence[int]) -> Sending:
        handoff_id = self.daemon.offer(sizes)
        places = self.daemon.handoffs[handoff_id].places
        pages = [[self.random.randbytes(self.layout.page_bytes) for _ in range(self.layout.layers)] for _ in places]
        for block, layers in enumerate(pages):
            for layer, page in enumerate(layers):
                self.daemon.expected[handoff_id, block, layer] = page
        self.sending.append(Sending(handoff_id, places, pages))
        return self.sending[-1]

    def receive(self, name: str, sizes: Sequence[int]) -> Receiving:
        places = self.daemon.places(sizes)
        pages = [[self.random.randbytes(self.layout.page_bytes) for _ in range(self.layout.layers)] for _ in places]
        blocks = [self.take_block() for _ in places]
        self.receiving[name] = Receiving(self.daemon.arena, places, pages, blocks, [0] * len(places))
        return self.receiving[name]

    def land(self, receiving: Receiving, block: int) -> None:
        """One more layer of this block arrives from elsewhere."""
        arena, place, layer = receiving.arena, receiving.places[block], receiving.landed[block]
        if layer == self.layout.layers or arena.generation(place.header_offset) != place.generation:
            return
        page = receiving.pages[block][layer]
        start = place.page_offset(self.layout, layer)
        arena.memory[start : start + self.layout.page_bytes] = page
        arena.set_checksum(place, layer, xxh3_64_intdigest(page))
        receiving.landed[block] += 1
        arena.set_watermark(place.header_offset, layer + 1)

    def spoil(self, receiving: Receiving, block: int, how: str) -> None:
        """`bytes`: the page that landed last is not what its checksum says. `slot`: the daemon gives it to another."""
        arena, place = receiving.arena, receiving.places[block]
        layer = max(0, receiving.landed[block] - 1)
        start = place.page_offset(self.layout, layer)
        if how == "slot":
            arena.reset(place.header_offset, self.layout, place.generation + 1000)
        arena.memory[start : start + self.layout.page_bytes] = self.random.randbytes(self.layout.page_bytes)

    def move_to(self, daemon: WatchfulDaemon) -> None:
        """The daemon dies; another one is there. What was being sent is forgotten, as the scheduler's half does."""
        self.daemon.die()
        self.daemon = self.line.daemon = daemon
        self._fence_seen = 0
        for sending in self.sending:
            self.give_back(list(sending.block_ids.values()))
        self.sending = []

    def take_block(self) -> int:
        return self.free.pop(self.random.randrange(len(self.free)))

    def give_back(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if self.device.pending_on_block(block_id):
                # Only a gather that the engine's own stream is behind, as the check of order will tell.
                assert all(work.what.startswith("gather") for work in self.device.pending_on_block(block_id))
        self.free += block_ids
        self.dirty |= set(block_ids)

    # --- a step -----------------------------------------------------------------------------------------------

    def step(self, *, hooks: str = "all", starting: Sequence[str] = (), blocks_a_step: int = 3) -> None:
        self.number += 1
        self.device.step = self.number
        saves, written = self._plan(blocks_a_step)
        loads = [
            Load(name, self.receiving[name].places, [self.receiving[name].block_ids], 99.0, self.daemon.ref.incarnation)
            for name in starting
            if name in self.receiving
        ]
        if self.device.lost:
            self.sending = []
        step = Step(
            self.number, self.daemon.ref.incarnation, len(written), saves=saves, loads=loads,
            finishing=self.finishing, dropping=self.dropping,
        )  # fmt: skip
        self.finishing, self.dropping = [], []
        with self.device.as_host("model"):
            self._zero()
            self.worker.begin(step)
            layers = range(self.layout.layers)
            last = len(layers) - (hooks == "late")
            self._forward(written, layers[:last], hooks)
            if self.random.random() < 0.5:  # one of vLLM's runners samples first, the other ends the step first
                self._forward(written, layers[last:], "none")
                last = len(layers)
            self.worker.load()
            self._forward(written, layers[last:], "none")
            deferred = self.random.random() < 0.3  # speculative decoding collects before the step's end
            if deferred:
                self._collect()
            self.worker.end()
            if not deferred:
                self._collect()
        self._preempt_or_finish()

    def _plan(self, blocks_a_step: int) -> tuple[list[Save], dict[int, list[bytes]]]:
        """What is saved; which blocks are written with what."""
        saves, written = [], {}
        for sending in self.sending:
            count = min(len(sending.places) - sending.next, self.random.randint(0, blocks_a_step), len(self.free))
            blocks = []
            for index in range(sending.next, sending.next + count):
                block_id = sending.block_ids[index] = self.take_block()
                written[block_id] = sending.pages[index]
                blocks.append((index, (block_id,), sending.places[index]))
            sending.next += count
            if blocks:
                last = sending.next == len(sending.places)
                pages = len(sending.places) * self.layout.layers
                saves.append(Save(sending.handoff_id, blocks, last=last, pages=pages))
        return saves, written

    def _zero(self) -> None:
        """Blocks that changed hands, before anything else of the step: also before the connector hears of it."""
        nothing = bytes(self.layout.page_bytes)
        loading = {block for receiving in self.receiving.values() for block in receiving.block_ids}
        for layer in range(self.layout.layers):
            self.device.compute(layer, dict.fromkeys(self.dirty - loading, nothing))
        self.dirty.clear()

    def _forward(self, written: dict[int, list[bytes]], layers: range, hooks: str) -> None:
        loaded = [block for receiving in self.over for block in receiving.block_ids if block not in receiving.invalid]
        for layer in layers:
            self.device.compute(layer, {block: pages[layer] for block, pages in written.items()}, reads=loaded)
            if hooks in ("all", "twice", "late") or (hooks == "some" and self.random.random() < 0.5):
                for _ in range(1 + (hooks == "twice")):
                    self.worker.save_layer(f"layer.{layer}")

    def _collect(self) -> None:
        report = self.worker.take_ended()
        invalid = self.worker.take_invalid()
        for name, result in report.loads.items() if report is not None else ():
            receiving = self.receiving.pop(name)
            receiving.result = result
            receiving.invalid = invalid.intersection(receiving.block_ids)
            self.check_loaded(receiving)
            self.over.append(receiving)

    def check_loaded(self, receiving: Receiving) -> None:
        """When a load is reported: what is not invalid is exact, and nothing touches the blocks any more."""
        assert receiving.result is not None
        assert receiving.result.ok == (not receiving.invalid)
        for block_id, pages in zip(receiving.block_ids, receiving.pages, strict=True):
            pending = [work.what for work in self.device.pending_on_block(block_id)]
            assert not any(what.startswith("scatter") for what in pending), "reported with a copy under way"
            for layer, page in enumerate(pages):
                start = block_id * self.layout.page_bytes
                now = self.memory[layer][start : start + self.layout.page_bytes]
                assert block_id in receiving.invalid or now == page

    def _preempt_or_finish(self) -> None:
        """Blocks go back at once: those of ended loads, of all that is saved, or of a preempted request."""
        for receiving in self.over:
            if receiving.block_ids and self.random.random() < 0.7:
                self.give_back(receiving.block_ids)
                receiving.block_ids = []
        for sending in self.sending:
            done = sending.next == len(sending.places)
            if done or self.random.random() < 0.3:
                self.give_back(list(sending.block_ids.values()))
                sending.block_ids = {}
        self.sending = [sending for sending in self.sending if sending.next < len(sending.places)]

    # --- between steps ----------------------------------------------------------------------------------------

    @property
    def work_left(self) -> int:
        return self.mover._completions._items.qsize()

    def complete(self, pieces: int) -> None:
        """The other thread gets on."""
        with self.device.as_host("completions"):
            for _ in range(min(pieces, self.work_left)):
                self.mover.work()
                self.check_fence()

    def check_fence(self) -> None:
        """No step that has passed has a copy to or from the arena under way."""
        arena: Headers = self.daemon.arena
        fence = arena.fence(0)
        assert fence >= self._fence_seen
        self._fence_seen = fence
        assert all(work.step > fence for work in self.device.pending_on(arena.memory)), "the fence came too early"

    def drain(self) -> None:
        """Idle: saves end by themselves, loads are asked for as vLLM does."""
        for _ in range(200):
            if not self.receiving and not self.sending:
                break
            self.device.advance(20)
            self.complete(3)
            self.step(hooks="none")
            self.check_fence()
            if self.number % 10 == 0:  # what lets work starve, does not for ever
                self.device.finish()
        assert not self.receiving
        assert not self.sending
        self.complete(self.work_left)

    def close(self) -> None:
        self.complete(self.work_left)
        with self.device.as_host("completions"):
            self.worker.close()
