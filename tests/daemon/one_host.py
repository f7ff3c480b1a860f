"""One daemon's handoffs without sockets, lanes or loop: a daemon whose two engines, P and D, live on its host."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from pdx.buffer.headers import Headers
from pdx.buffer.policies import POLICIES
from pdx.buffer.store import Store
from pdx.buffer.water import NEVER, Waterline
from pdx.config import Eviction
from pdx.daemon.handoffs import Handoffs
from pdx.daemon.lanes import Lanes
from pdx.daemon.ports import Ports
from pdx.daemon.sessions import Engine, Session
from pdx.daemon.trace import Tracer
from pdx.handoff.handle import TransferHandle, mint
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.layout import PageLayout
from pdx.tiers.spill import WriteMode
from pdx.tiers.tier import Tier
from pdx.wire import (
    Budgets,
    DaemonRef,
    EngineInfo,
    Filled,
    FilledEntry,
    LetGo,
    LoadOpened,
    Message,
    OpenLoad,
    OpenSend,
    PeerMessage,
)

KEY = b"k" * 32
PAGES = PageLayout(layers=2, page_bytes=64, chunk_blocks=2)
BUDGETS = Budgets(grant_s=3.0, slab_s=3.0, total_s=12.0, claim_s=1.0)
HASHES = [b"one", b"two", b"three"]
HERE = DaemonRef(daemon_id="here", incarnation=1, control="", lanes=[])


class Host:
    """A daemon without its loop: `tick` delivers what it sent itself, as the loop's next turn does."""

    def __init__(
        self, extents: int = 2, tier: Tier | None = None, *, policy: Eviction = "lru",
        write_mode: WriteMode = WriteMode.THROUGH, waterline: Waterline = NEVER, kinds_file: Path | None = None,
    ) -> None:  # fmt: skip
        memory = memoryview(bytearray(4096 + extents * (64 << 10)))
        self.store = Store(
            Headers(memory), extent_bytes=64 << 10, handoff_share=0.9, poison=True, policy=POLICIES[policy]()  # type: ignore[arg-type]
        )  # fmt: skip
        self.now = 0.0
        self.heard: dict[str, list[Message]] = {"P": [], "D": []}
        self.counters: Counter[str] = Counter()
        self._to_self: list[PeerMessage] = []
        self.handoffs = Handoffs(
            self.store,
            Ports(
                me=HERE, cluster_key=KEY, to_engine=lambda name, message: self.heard.get(name, []).append(message),
                to_peer=lambda ref, message: self._to_self.append(message),  # type: ignore[arg-type]
                to_routers=lambda message: None, engine=engine, fence_passed=lambda name, step: True,
                lanes=Lanes([], me=HERE.daemon_id, counters=self.counters),
                tracer=Tracer(), counters=self.counters, lease_s=30.0, digest_mode=False, tier=tier,
                write_mode=write_mode, waterline=waterline, kinds_file=kinds_file,
            ),
        )  # fmt: skip

    def tick(self, after_s: float = 0.0) -> None:
        self.now += after_s
        while self._to_self:
            self.handoffs.peer_message(self._to_self.pop(0), self.now)
        self.handoffs.tick(self.now)
        self.store.check_integrity()

    def send(self, number: int = 0, hashes: list[bytes] = HASHES) -> None:
        message = OpenSend(request_id="p", handle=handle(number), block_hashes=hashes, prompt_tokens=0, tail_hash=b"")
        self.handoffs.open_send(engine("P"), message, self.now)
        self.tick()

    def fill(self, blocks: list[int], layers: range = range(PAGES.layers), number: int = 0) -> None:
        for layer in layers:
            entry = FilledEntry(handoff_id=name(number), blocks=blocks)
            message = Filled(step=1, step_started_ns=0, layer=layer, filled_ns=0, entries=[entry])
            self.handoffs.filled("P", message, self.now)
            self.tick()

    def prefill(self, number: int = 0) -> None:
        """All of it, to the end."""
        self.send(number)
        self.fill([0, 1, 2], number=number)
        self.handoffs.let_go("P", LetGo(handoff_id=name(number), side="send", fence=1, ok=True), self.now)
        self.tick()

    def ask(self, number: int = 0, *, early: bool = True, hashes: list[bytes] = HASHES) -> str:
        """Returns the status of the answer."""
        message = OpenLoad(
            request_id="d", handle=handle(number), block_hashes=hashes, prompt_tokens=0, tail_hash=b"", early=early
        )
        self.handoffs.open_load(engine("D"), message, self.now)
        (answer,) = self.answers()
        return answer.status

    def let_go(self, number: int = 0, **about: Any) -> None:
        self.handoffs.let_go("D", LetGo(handoff_id=name(number), side="load", fence=0, **about), self.now)
        self.tick()

    def answers(self) -> list[LoadOpened]:
        """What decode heard of its question since the last look."""
        answers = [message for message in self.heard["D"] if isinstance(message, LoadOpened)]
        self.heard["D"].clear()
        return answers

    def told(self) -> list[tuple[str, int]]:
        return [(answer.status, len(answer.places)) for answer in self.answers()]


def engine(name: str) -> Engine:
    content = ContentFingerprint(
        model="m", weights="w", weight_epoch="", dtype="bf16", block_tokens=16, hash_algorithm="sha"
    )
    layout = LayoutFingerprint(
        engine="e", attention="a", layers=PAGES.layers, page_bytes=PAGES.page_bytes, block_tokens=16, packing="L",
        kv_groups=1, ranks=1, chunk_blocks=PAGES.chunk_blocks,
    )  # fmt: skip
    return Engine(
        EngineInfo(engine_id=name, role="both", model="m", content=content, layout=layout), pages=PAGES,
        scheduler=Session(1, "scheduler", None, b""), workers={0: Session(2, "worker", None, b"")},  # type: ignore[arg-type]
    )  # fmt: skip


def name(number: int) -> bytes:
    return bytes([number]) * 16


def handle(number: int) -> str:
    return mint(
        TransferHandle(
            handoff_id=name(number), attempt=1, prefill_engine="P", decode_engine="D", prefill_daemon=HERE,
            decode_daemon=HERE, budgets=BUDGETS, issued_unix_s=time.time(),
        ), KEY,
    )  # fmt: skip
