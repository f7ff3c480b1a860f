"""Two daemons' movers in one thread, without sockets: messages lost or late, puts that fail, engines that die.

After every event no slot that somebody may still touch is given to another, the books agree, and every page that a
decode engine may use is right; at the end, with time passed and engines gone, nothing is held.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import xxhash

from pdx.buffer.headers import Headers
from pdx.buffer.slots import SlotState
from pdx.buffer.store import Store
from pdx.daemon.mover import Mover
from pdx.daemon.ports import Ports
from pdx.daemon.sessions import Engine, Session
from pdx.daemon.trace import Tracer
from pdx.handoff.handle import TransferHandle, mint
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.layout import PageLayout, Place
from pdx.transport.api import Arrived, Copy, Event, PutDone, PutFailed, RemoteRegion, Span, WindowClosed
from pdx.wire import (
    Budgets,
    DaemonRef,
    EngineInfo,
    Filled,
    FilledEntry,
    LetGo,
    LoadEnded,
    LoadOpened,
    Message,
    OpenLoad,
    OpenSend,
    Renew,
    SendEnded,
    SendOpened,
)

KEY = b"k" * 32
PAGES = PageLayout(layers=2, page_bytes=64, chunk_blocks=2)
BUDGETS = Budgets(grant_s=3.0, slab_s=3.0, total_s=12.0, claim_s=1.0)
EXTENT_BYTES = 64 << 10
EVENTS = 900
END_S = 60.0


class SimulatedLane:
    """Puts wait here until the network's chance delivers or breaks them. Windows as in the contract."""

    scheme = "sim"
    checked_by = "receiver"

    def __init__(self, network: dict[str, SimulatedLane], name: str) -> None:
        self.endpoint = f"sim://{name}"
        self._network = network
        network[self.endpoint] = self
        self.memory = memoryview(b"")
        self.puts: list[tuple[int, str, int, list[Copy], bytes, bytes]] = []
        self.windows: dict[int, list[Span]] = {}
        self.events: list[Event] = []
        self._channels: list[str] = []
        self._ticket = 0

    def register(self, memory: memoryview) -> SimulatedLane:
        self.memory = memory
        return self

    def describe(self) -> RemoteRegion:
        return RemoteRegion(length=len(self.memory))

    def open_window(self, spans: list[Span]) -> int:
        self._ticket += 1
        self.windows[self._ticket] = list(spans)
        return self._ticket

    def close_window(self, window: int) -> None:
        if self.windows.pop(window, None) is not None:
            self.events.append(WindowClosed(window))

    def connect(self, endpoint: str) -> int:
        if endpoint not in self._channels:
            self._channels.append(endpoint)
        return self._channels.index(endpoint)

    def put(
        self,
        channel: int,
        *,
        region: object,
        window: int,
        copies: list[Copy],
        notice: bytes,
        queue: bytes,
        urgency: float,
    ) -> int:
        self._ticket += 1
        self.puts.append((self._ticket, self._channels[channel], window, list(copies), notice, queue))
        return self._ticket

    def cancel(self, queue: bytes) -> None:
        for put in [put for put in self.puts if put[5] == queue]:
            self.puts.remove(put)
            self.events.append(PutFailed(put[0], "cancelled"))

    def move_one(self, *, whole: bool) -> None:
        """The oldest put arrives, or breaks with some of its bytes written."""
        ticket, endpoint, window, copies, notice, _ = self.puts.pop(0)
        far = self._network[endpoint]
        if window in far.windows:
            for copy in copies if whole else copies[:1]:
                span = far.windows[window]
                assert any(
                    s.offset <= copy.target_offset and copy.target_offset + copy.length <= _end_of_run(span, s)
                    for s in span
                ), "a put outside of its window"
                source = self.memory[copy.source_offset : copy.source_offset + copy.length]
                far.memory[copy.target_offset : copy.target_offset + copy.length] = source
            if whole:
                far.events.append(Arrived(window, notice))
        self.events.append(PutDone(ticket) if whole else PutFailed(ticket, "broken"))


def _end_of_run(spans: list[Span], first: Span) -> int:
    """Where the spans that follow one another from `first` end."""
    starts = {span.offset: span.length for span in spans}
    end = first.offset
    while end in starts:
        end += starts[end]
    return end


def page_of(name: bytes, layer: int) -> bytes:
    return hashlib.blake2b(name + bytes([layer]), digest_size=64).digest()


class SimulatedEngine:
    """What an engine does, one small step at a time: asks, writes, reads, lets go; or is dead."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name, self.alive = host, name, True
        self.sends: dict[bytes, tuple[SendOpened, list[bytes], list[tuple[int, int]]]] = {}
        self.loads: dict[bytes, tuple[LoadOpened, list[bytes]]] = {}
        self.asked: dict[str, list[bytes]] = {}
        self.step = 0
        self.asleep_until = 0.0  # stopped by somebody: it holds what it holds, and says nothing
        host.engines[name] = self

    def hear(self, message: Message) -> None:
        match message:
            case SendOpened():
                names = self.asked.get(message.request_id, [])
                todo = [(layer, n) for layer in range(PAGES.layers) for n, p in enumerate(message.places) if p]
                self.sends[message.handoff_id] = (message, names, todo)
            case LoadOpened() if message.status == "granted":
                self.loads[message.handoff_id] = (message, self.asked.get(message.request_id, []))
            case SendEnded() if message.handoff_id:
                self.sends.pop(message.handoff_id, None)
                self.say(LetGo(handoff_id=message.handoff_id, side="send", fence=self.step, ok=False))
            case LoadEnded():
                self.loads.pop(message.handoff_id, None)
                self.say(LetGo(handoff_id=message.handoff_id, side="load", fence=self.step, ok=False))

    def say(self, message: Message) -> None:
        self.host.world.post(self.host, self.name, message)

    def work(self, chance: random.Random) -> None:
        if self.host.world.now < self.asleep_until:
            return
        self.step += 1
        self.say(Renew(handoff_ids=[*self.sends, *self.loads]))
        for handoff_id, (opened, names, todo) in list(self.sends.items()):
            for layer, n in todo[: chance.randint(0, 4)]:
                self.host.write(opened.places[n], layer, page_of(names[n], layer))
                entry = FilledEntry(handoff_id=handoff_id, blocks=[n])
                self.say(Filled(step=self.step, step_started_ns=0, layer=layer, filled_ns=0, entries=[entry]))
                todo.remove((layer, n))
            if not todo:
                del self.sends[handoff_id]
                self.say(LetGo(handoff_id=handoff_id, side="send", fence=self.step, ok=True))
        for handoff_id, (loaded, names) in list(self.loads.items()):
            if self.host.readable(loaded.places, names):
                del self.loads[handoff_id]
                self.say(LetGo(handoff_id=handoff_id, side="load", fence=self.step, ok=True))

    @property
    def touched(self) -> Iterator[Place]:
        """Places that this engine may still write or read."""
        for opened, _, _ in self.sends.values():
            yield from (place for place in opened.places if place)
        for loaded, _ in self.loads.values():
            yield from loaded.places


class SimulatedArena(Headers):
    """The Store's view of an arena: memory with headers."""


class Host:
    """One daemon: a mover over a small store, and its engines."""

    def __init__(self, world: World, name: str, number: int) -> None:
        self.world, self.name = world, name
        self.ref = DaemonRef(daemon_id=name, incarnation=number, control=name, lanes=[f"sim://{name}"])
        self.arena = SimulatedArena(memoryview(bytearray(4096 + 2 * EXTENT_BYTES)))
        self.store = Store(self.arena, extent_bytes=EXTENT_BYTES, handoff_share=0.9, poison=True)  # type: ignore[arg-type]
        self.lane = SimulatedLane(world.network, name)
        self.engines: dict[str, SimulatedEngine] = {}
        self.counters: Counter[str] = Counter()
        self.mover = Mover(
            self.store,
            Ports(
                me=self.ref, cluster_key=KEY, to_engine=self._to_engine,
                to_peer=lambda ref, message: world.post(world.hosts[ref.daemon_id], "", message),
                to_routers=lambda message: None, engine=self._engine,
                fence_passed=lambda name, step: name not in self.engines or self.engines[name].step >= step,
                lanes={"sim": (self.lane, self.lane.register(self.arena.memory))},  # type: ignore[dict-item]
                tracer=Tracer(), counters=self.counters, lease_s=2.0, digest_mode=False,
            ),
        )  # fmt: skip

    def _engine(self, name: str) -> Engine | None:
        if name not in self.engines:
            return None
        content = ContentFingerprint(
            model="m", weights="w", weight_epoch=0, dtype="bf16", block_tokens=16, hash_algorithm="sha"
        )
        layout = LayoutFingerprint(
            engine="sim", attention="none", layers=PAGES.layers, page_bytes=PAGES.page_bytes, block_tokens=16,
            packing="L", kv_groups=1, rank=0, world_size=1,
        )  # fmt: skip
        info = EngineInfo(engine_id=name, role="both", model="m", content=content, layout=layout)
        halves: Any = Session
        return Engine(info, pages=PAGES, scheduler=halves, worker=halves)

    def _to_engine(self, name: str, message: Message) -> None:
        if name in self.engines:
            self.world.post(self, f"to {name}", message)

    def take(self, sender: str, message: Message, now: float) -> None:
        mover = self.mover
        match message:
            case OpenSend() if (engine := self._engine(sender)) is not None:
                mover.open_send(engine, message, now)
            case OpenLoad() if (engine := self._engine(sender)) is not None:
                mover.open_load(engine, message, now)
            case Filled():
                mover.filled(sender, message, now)
            case LetGo():
                mover.let_go(sender, message, now)
            case Renew():
                mover.renew(message.handoff_ids, now)
            case _ if not sender:
                mover.peer_message(message, now)  # type: ignore[arg-type]

    def write(self, place: Place | None, layer: int, content: bytes) -> None:
        assert place is not None
        start = place.page_offset(PAGES, layer)
        self.arena.memory[start : start + PAGES.page_bytes] = content
        self.arena.set_checksum(place, layer, xxhash.xxh3_64_intdigest(content))
        if self.arena.watermark(place.header_offset) == layer:
            self.arena.set_watermark(place.header_offset, layer + 1)

    def readable(self, places: list[Place], names: list[bytes]) -> bool:
        """Whether all pages are there. Every one that a checksum vouches for must be right."""
        whole = True
        for place, name in zip(places, names, strict=False):
            for layer in range(PAGES.layers):
                start = place.page_offset(PAGES, layer)
                content = bytes(self.arena.memory[start : start + PAGES.page_bytes])
                here = layer < self.arena.watermark(place.header_offset)
                assert self.arena.generation(place.header_offset) == place.generation, "a leased slot changed hands"
                if here:
                    assert content == page_of(name, layer), "a wrong page"
                whole &= here
        return whole

    def check(self) -> None:
        self.store.check_integrity()
        for engine in self.engines.values():
            for place in engine.touched:
                slot = self.store.slots.get(place.slot_offset)
                assert slot is not None, f"{engine.name} may touch a free slot"
                assert slot.generation == place.generation, f"{engine.name} may touch another's slot"
                assert slot.holds, slot
        for _, _, _, copies, _, _ in self.lane.puts:
            for copy in copies:
                assert self._held(copy.source_offset), "a put may read a free slot"
        for window in self.lane.windows.values():
            for span in window:
                assert self._held(span.offset), "an open window over a free slot"

    def _held(self, offset: int) -> bool:
        return any(
            slot.run.offset <= offset < slot.run.offset + slot.blocks * PAGES.unit_bytes and slot.holds
            for slot in self.store.slots.values()
        )


class World:
    """Everything under way, in one queue per pair of ends: order is kept, loss and delay are not excluded."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now = 0.0
        self.network: dict[str, SimulatedLane] = {}
        self.hosts: dict[str, Host] = {}
        self.queues: dict[tuple[str, str], list[Message]] = {}
        for number, name in enumerate(("a", "b"), start=1):
            self.hosts[name] = Host(self, name, number)
        self.born = 0
        for host in self.hosts.values():
            for _ in range(2):
                self.bear(host)

    def bear(self, host: Host) -> None:
        self.born += 1
        SimulatedEngine(host, f"e{self.born}")

    def post(self, host: Host, end: str, message: Message) -> None:
        if self.chance.random() > 0.01:
            self.queues.setdefault((host.name, end), []).append(message)

    def event(self) -> None:
        chance, hosts = self.chance, list(self.hosts.values())
        host = chance.choice(hosts)
        self.now += chance.choice([0.0, 0.0, 0.0, 0.005, 0.02, 0.1])
        way = chance.random()
        if way < 0.04:
            self._request()
        elif way < 0.045 and len(host.engines) > 1:
            self._kill(host, chance.choice(sorted(host.engines)))
        elif way < 0.05 and host.engines:
            self._cancel(host)
        elif way < 0.055 and host.engines:
            host.engines[chance.choice(sorted(host.engines))].asleep_until = self.now + 6.0
        elif way < 0.3 and host.lane.puts:
            host.lane.move_one(whole=chance.random() > 0.05)
        elif way < 0.55 and host.engines:
            host.engines[chance.choice(sorted(host.engines))].work(chance)
        else:
            for _ in range(chance.randint(1, 6)):
                self._deliver()
        self.settle()

    def settle(self) -> None:
        for host in self.hosts.values():
            events, host.lane.events = host.lane.events, []
            host.mover.lane_events(events, self.now)
            host.mover.tick(self.now)
            host.check()

    def _deliver(self) -> None:
        full = [key for key, queue in self.queues.items() if queue]
        if not full:
            return
        key = self.chance.choice(full)
        message, (host_name, end) = self.queues[key].pop(0), key
        host = self.hosts[host_name]
        if end.startswith("to "):
            if end[3:] in host.engines and self.now < host.engines[end[3:]].asleep_until:
                self.queues[key].insert(0, message)
            elif end[3:] in host.engines:
                host.engines[end[3:]].hear(message)
        elif not end or end in host.engines:
            host.take(end, message, self.now)

    def _request(self) -> None:
        engines = [engine for host in self.hosts.values() for engine in host.engines.values()]
        prefill, decode = self.chance.choice(engines), self.chance.choice(engines)
        names = [b"shared" + bytes([n]) for n in range(self.chance.randint(0, 3))]
        names += [self.chance.randbytes(8) for _ in range(self.chance.randint(0, 9))]
        tail = self.chance.choice([b"", self.chance.randbytes(8)])
        handle = TransferHandle(
            handoff_id=self.chance.randbytes(16), attempt=0, prefill_engine=prefill.name, decode_engine=decode.name,
            prefill_daemon=prefill.host.ref, decode_daemon=decode.host.ref, budgets=BUDGETS, issued_unix_s=time.time(),
        )  # fmt: skip
        request, text = handle.handoff_id.hex(), mint(handle, KEY)
        prefill.asked[request] = decode.asked[request] = names + [tail] * bool(tail)
        about = {"request_id": request, "handle": text, "block_hashes": names, "prompt_tokens": 1, "tail_hash": tail}
        prefill.say(OpenSend(**about))  # type: ignore[arg-type]
        for _ in range(self.chance.randint(0, 3)):
            decode.say(OpenLoad(**about))  # type: ignore[arg-type]

    def _kill(self, host: Host, name: str) -> None:
        del host.engines[name]
        host.mover.engine_gone(name, self.now)
        self.bear(host)

    def _cancel(self, host: Host) -> None:
        engine = host.engines[self.chance.choice(sorted(host.engines))]
        if engine.asked:
            host.mover.cancel(bytes.fromhex(self.chance.choice(list(engine.asked))), 0, "client left", self.now)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_nothing_is_shared_by_mistake_or_kept_for_ever(seed: int) -> None:
    print(f"seed {seed}")
    world = World(random.Random(seed))
    for _ in range(EVENTS):
        world.event()
    counters = sum((host.counters for host in world.hosts.values()), Counter())
    assert counters["receives_settled"], counters
    for host in world.hosts.values():
        for name in list(host.engines):
            world._kill(host, name)
    end = world.now + END_S
    while world.now < end:
        world.now += 0.5
        for host in world.hosts.values():
            while host.lane.puts:
                host.lane.move_one(whole=True)
        while any(world.queues.values()):
            world._deliver()
        world.settle()
    for host in world.hosts.values():
        stats = host.store.stats()
        assert not any(stats["leases"].values()), host.mover.describe()
        assert stats["slots"][SlotState.FILLING] + stats["slots"][SlotState.QUARANTINE] == 0
        assert host.mover.describe() == []
        assert not host.lane.windows
