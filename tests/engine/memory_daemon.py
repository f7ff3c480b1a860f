"""A pdxd in this process's memory: claims, follows and serves handoffs between engines that share its arena.

Complete for what engines see of a daemon on one host. It never evicts and never runs out of budget; tests make it late
(`hold_back`), hostile (they write into `arena.memory`) or dead (`die`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pdx.buffer.headers import Headers
from pdx.engine.vllm.watch import Watch
from pdx.errors import DaemonGone
from pdx.handoff.handle import TransferHandle, mint, verify
from pdx.layout import CONTROL_BYTES, PageLayout, Place, round_up
from pdx.wire import (
    ENGINE,
    TO_ENGINE,
    Attached,
    Budgets,
    DaemonRef,
    Filled,
    Keep,
    LetGo,
    LoadEnded,
    LoadOpened,
    LookUp,
    Message,
    OpenLoad,
    OpenSend,
    Renew,
    Reset,
    SendEnded,
    SendOpened,
    WeightEpoch,
    decoder_of,
    encode,
)

KEY = b"k" * 32
HASH_BYTES = 32
_decode_engine = decoder_of(ENGINE)
_decode_daemon = decoder_of(TO_ENGINE)


@dataclass
class Handoff:
    request: OpenSend
    places: list[Place]
    filled: dict[int, set[int]] = field(default_factory=dict)  # block -> layers
    let_go: dict[str, LetGo] = field(default_factory=dict)


class MemoryDaemon:
    """One arena, one slot of one block per block."""

    def __init__(self, layout: PageLayout, *, blocks: int, incarnation: int = 1, digest_mode: bool = False) -> None:
        self.layout = layout
        self.ref = DaemonRef(daemon_id="memory", incarnation=incarnation, control="", lanes=[])
        self.digest_mode = digest_mode
        area = round_up(blocks * layout.header_bytes, 4096)
        self.arena_bytes = CONTROL_BYTES + area + blocks * layout.unit_bytes
        self.arena: Headers = Headers(memoryview(bytearray(self.arena_bytes)))
        self._units = CONTROL_BYTES + area
        self._capacity = blocks
        self._used = 0
        self._generation = 0
        self.handoffs: dict[bytes, Handoff] = {}
        self.clients: list[MemoryClient] = []
        self.received: list[Message] = []
        self.let_go: list[LetGo] = []
        self.kept: dict[bytes, Place] = {}  # (epoch +) block hash -> whole block of a request without a handle
        self._offers: dict[bytes, dict[bytes, Place]] = {}
        self.load_status: str | None = None  # answer this instead of looking
        self._early: list[tuple[MemoryClient, OpenLoad]] = []  # questions that wait for their first page
        self.hold_back = False  # answers stay in the queue
        self.alive = True

    def client(self, epoch: str = "") -> MemoryClient:
        """`epoch`: of its engine's weights, as its hello says."""
        client = MemoryClient(self, fence_offset=8 * len(self.clients))
        client.epoch = epoch
        self.clients.append(client)
        return client

    def handle(self, number: int = 1, *, budgets: Budgets | None = None) -> str:
        return mint(
            TransferHandle(
                handoff_id=number.to_bytes(16, "big"),
                attempt=0,
                prefill_engine="p",
                decode_engine="d",
                prefill_daemon=self.ref,
                decode_daemon=self.ref,
                budgets=budgets or Budgets(),
                issued_unix_s=1e9,
            ),
            KEY,
        )

    def fence(self, client: MemoryClient) -> int:
        return self.arena.fence(client.attached.fence_offset)

    def die(self) -> None:
        self.alive = False

    def give_up(self) -> None:
        """Every early question is answered: nothing will come."""
        early, self._early = self._early, []
        for asker, question in early:
            handoff_id = verify(question.handle, KEY, now_unix_s=1e9).handoff_id
            asker.deliver(LoadOpened(request_id=question.request_id, handoff_id=handoff_id, status="absent"))

    def end_load(self, client: MemoryClient, handoff_id: bytes, reason: str) -> None:
        client.deliver(LoadEnded(handoff_id=handoff_id, reason=reason))

    def take(self, client: MemoryClient, message: Message) -> None:
        self.received.append(message)
        match message:
            case OpenSend():
                self._open_send(client, message)
            case Filled():
                for entry in message.entries:
                    filled = self.handoffs[entry.handoff_id].filled
                    for block in entry.blocks:
                        assert message.layer not in filled.setdefault(block, set()), "a page was sent twice"
                        filled[block].add(message.layer)
                early, self._early = self._early, []
                for asker, question in early:
                    self._open_load(asker, question, again=True)
            case OpenLoad():
                self._open_load(client, message)
            case LookUp():
                self._look_up(client, message)
            case Keep():
                self._keep(client, message)
            case LetGo():
                self.let_go.append(message)
                offer = self._offers.pop(message.handoff_id, {}) if message.side == "send" else {}
                if message.ok:
                    self.kept.update(offer)
                if message.handoff_id in self.handoffs:
                    self.handoffs[message.handoff_id].let_go[message.side] = message
            case Renew():
                pass
            case WeightEpoch():
                client.epoch = message.epoch
            case Reset():
                for blocks in (self.kept, *self._offers.values()):
                    for key in [key for key in blocks if key[:-HASH_BYTES] == message.epoch.encode()]:
                        del blocks[key]

    def _open_send(self, client: MemoryClient, message: OpenSend) -> None:
        handoff_id = verify(message.handle, KEY, now_unix_s=1e9).handoff_id
        blocks = len(message.block_hashes) + bool(message.tail_hash)
        if self._used + blocks > self._capacity or handoff_id in self.handoffs:
            client.deliver(SendEnded(request_id=message.request_id, handoff_id=b"", reason="full or used"))
            return
        places = [self._claim() for _ in range(blocks)]
        self.handoffs[handoff_id] = Handoff(message, places)
        client.deliver(SendOpened(request_id=message.request_id, handoff_id=handoff_id, places=list(places)))

    def _look_up(self, client: MemoryClient, message: LookUp) -> None:
        places = []
        for key in self._keys(client, message.block_hashes):
            if key not in self.kept:
                break
            places.append(self.kept[key])
        client.deliver(
            LoadOpened(
                request_id=message.request_id, handoff_id=message.handoff_id,
                status="granted" if places else "absent", places=places,
            )
        )  # fmt: skip

    def _keep(self, client: MemoryClient, message: Keep) -> None:
        keys = self._keys(client, message.block_hashes)
        fresh = [key for key in keys if key not in self.kept]
        if self._used + len(fresh) > self._capacity:
            client.deliver(SendEnded(request_id=message.request_id, handoff_id=b"", reason="full"))
            return
        offer = self._offers[message.handoff_id] = {key: self._claim() for key in fresh}
        places = [offer.get(key) for key in keys]
        client.deliver(SendOpened(request_id=message.request_id, handoff_id=message.handoff_id, places=places))

    def _keys(self, client: MemoryClient, block_hashes: list[bytes]) -> list[bytes]:
        """Engines of other weights have other names for the same tokens."""
        return [client.epoch.encode() + block_hash for block_hash in block_hashes]

    def _claim(self) -> Place:
        unit, self._used, self._generation = self._used, self._used + 1, self._generation + 1
        header = CONTROL_BYTES + unit * self.layout.header_bytes
        self.arena.reset(header, self.layout, self._generation)
        return Place(self._units + unit * self.layout.unit_bytes, 1, 0, header, self._generation)

    def _open_load(self, client: MemoryClient, message: OpenLoad, *, again: bool = False) -> None:
        handoff_id = verify(message.handle, KEY, now_unix_s=1e9).handoff_id
        handoff = self.handoffs.get(handoff_id)
        if message.early and not (handoff and handoff.filled):
            self._early.append((client, message))
            if not again:
                client.deliver(LoadOpened(request_id=message.request_id, handoff_id=handoff_id, status="wait"))
            return
        status = self.load_status or ("granted" if handoff else "absent")
        places: list[Place] = []
        if status == "granted":
            assert handoff is not None
            sent = handoff.request
            same = (sent.block_hashes, sent.tail_hash) == (message.block_hashes, message.tail_hash)
            matching = 0
            for ours, theirs in zip(sent.block_hashes, message.block_hashes, strict=False):
                if ours != theirs:
                    break
                matching += 1
            places = handoff.places if same else handoff.places[:matching]
            status = "granted" if places else "absent"
        client.deliver(
            LoadOpened(request_id=message.request_id, handoff_id=handoff_id, status=status, places=list(places))  # type: ignore[arg-type]
        )


class MemoryClient:
    """What an engine sees of it: a DaemonClient without sockets. Messages pass through their encoding."""

    def __init__(self, daemon: MemoryDaemon, *, fence_offset: int) -> None:
        self._daemon = daemon
        self._inbox: deque[bytes] = deque()
        self.voices: list[MemoryVoice] = []
        self.epoch = ""
        self.arena: Headers | None = daemon.arena
        self.attached = Attached(
            daemon=daemon.ref,
            session=fence_offset,
            socket="",
            arena_bytes=daemon.arena_bytes,
            fence_offset=fence_offset,
            digest_mode=daemon.digest_mode,
            lease_s=30.0,
        )

    @property
    def alive(self) -> bool:
        return self._daemon.alive

    def send(self, message: Message) -> None:
        if not self.alive:
            raise DaemonGone("dead")
        self._daemon.take(self, _decode_engine(encode(message)))

    def deliver(self, message: Message) -> None:
        self._inbox.append(encode(message))

    def poll(self) -> list[Message]:
        if self._daemon.hold_back or not self.alive:
            return []
        messages = [_decode_daemon(frame) for frame in self._inbox]
        self._inbox.clear()
        return messages

    def wait(self, timeout_s: float) -> list[Message]:
        return self.poll()  # what will come is here: the daemon answers within `send`

    def finish_sending(self, *, timeout_s: float) -> None:
        """All is sent."""

    def voice(self) -> MemoryVoice:
        return MemoryVoice(self)

    def publish_fence(self, step: int) -> None:
        assert self.arena is not None
        self.arena.set_fence(self.attached.fence_offset, step)

    def close(self) -> None:
        self.arena = None


class MemoryVoice:
    """Another thread's way to say the same."""

    def __init__(self, client: MemoryClient) -> None:
        self._client = client
        self.open = True
        client.voices.append(self)

    def send(self, message: Message) -> None:
        assert self.open
        self._client.send(message)

    def finish_sending(self, *, timeout_s: float) -> None:
        """All is sent."""

    def close(self) -> None:
        self.open = False


class MemoryAttachment:
    """Attaches to whichever daemon the test puts in `daemon`."""

    def __init__(self, daemon: MemoryDaemon) -> None:
        self.daemon: MemoryDaemon | None = daemon
        self._epoch = ""
        self._client: MemoryClient | None = None

    def client(self) -> MemoryClient | None:
        if self._client is not None and not self._client.alive:
            self._client.close()
            self._client = None
        if self._client is None and self.daemon is not None and self.daemon.alive:
            self._client = self.daemon.client(self._epoch)
        return self._client

    def at(self, epoch: str) -> None:
        """The next daemon hears at once that the engine's weights are of this epoch."""
        self._epoch = epoch

    def leave(self) -> None:
        """As if the daemon had died. Another client is there at once."""
        self.close()

    def hold(self) -> None:
        """An arena of this process: nobody else needs its memory."""

    def let_go(self) -> None:
        """See `hold`."""

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def steady() -> Watch:
    """Over weights that never change."""
    watch = Watch()
    watch.begin(lambda: "weights")
    return watch
