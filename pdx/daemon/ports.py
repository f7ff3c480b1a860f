"""What the handoff drivers share: the store, the way out, and the memory of what has ended."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdx.buffer.lease import Lease, LeaseState
from pdx.buffer.store import Store
from pdx.buffer.water import NEVER, Waterline
from pdx.daemon.lanes import Lanes
from pdx.daemon.sessions import Engine
from pdx.daemon.trace import Tracer
from pdx.errors import HandleError
from pdx.handoff.handle import HANDOFF_ID_BYTES, SeenHandles, TransferHandle, verify
from pdx.keys import space_of
from pdx.tiers.spill import WriteMode
from pdx.tiers.tier import Tier
from pdx.wire import DaemonRef, HandoffFailed, Message

HandoffKey = tuple[bytes, int]  # handoff id, attempt

# Each is ~100 bytes; at 500 handoffs a second they reach back two minutes, a handoff's whole budget.
TOMBSTONES_MAX = 65_536
ROUTER_SAYS = "router: "  # stands before the reasons of what it has ended
LOGGED_A_SECOND = 10

log = logging.getLogger("pdxd")


@dataclass(frozen=True)
class Ports:
    """The drivers' way to the world, so that the same code runs in pdxd and in a simulation."""

    me: DaemonRef
    cluster_key: bytes
    to_engine: Callable[[str, Message], None]  # engine id, message
    to_peer: Callable[[DaemonRef, Message], None]
    to_routers: Callable[[Message], None]
    engine: Callable[[str], Engine | None]
    fence_passed: Callable[[str, int], bool]  # engine id, step
    lanes: Lanes
    tracer: Tracer
    counters: Counter[str]
    lease_s: float
    digest_mode: bool
    tier: Tier | None = None  # below the arena
    kinds_file: Path | None = None  # where the kinds of blocks that a tier keeps outlive the daemon
    write_mode: WriteMode = WriteMode.THROUGH
    waterline: Waterline = NEVER
    pin_share: float = 0.25  # of the arena
    return_answers: bool = True  # to the daemons whose prompts they answer, and from those that answer ours
    new_id: Callable[[], bytes] = lambda: secrets.token_bytes(HANDOFF_ID_BYTES)
    wall_clock: Callable[[], float] = time.time
    trace_clock_ns: Callable[[], int] = time.monotonic_ns


@dataclass
class Desk:
    """Ports, store and tombstones in one place. Owned by the control thread."""

    store: Store
    ports: Ports
    seen: SeenHandles = field(default_factory=SeenHandles)
    tombstones: dict[HandoffKey, str] = field(default_factory=dict)
    stirred: dict[HandoffKey, None] = field(default_factory=dict)  # what may be the answer to an early question now
    log_second: int = 0
    logged: int = 0  # failures in this second

    def verified(self, text: str, *, daemon: str) -> TransferHandle:
        """The handle, if it is good for this daemon. Raises HandleError."""
        handle = verify(text, self.ports.cluster_key, now_unix_s=self.ports.wall_clock())
        named: DaemonRef = getattr(handle, daemon)
        me = self.ports.me
        if (named.daemon_id, named.incarnation) != (me.daemon_id, me.incarnation):
            raise HandleError("handle names another daemon, or an earlier life of this one")
        return handle

    def use(self, handle: TransferHandle, side: str) -> None:
        """Marks a handle that is good used on that side. Raises HandleError."""
        if (handle.handoff_id, handle.attempt) in self.tombstones:
            raise HandleError("this handoff has ended already")
        self.seen.use(handle, side, now_unix_s=self.ports.wall_clock())

    def ids(self, handle: TransferHandle, *, lease_epoch: int) -> dict[str, Any]:
        """The four fields of every PeerMessage."""
        return {
            "handoff_id": handle.handoff_id,
            "attempt": handle.attempt,
            "lease_epoch": lease_epoch,
            "incarnation": self.ports.me.incarnation,
        }

    def end_lease(self, lease: Lease) -> None:
        """For a holder that is known to be quiet, whether or not it still had the right."""
        if lease.state is LeaseState.QUARANTINED:
            self.store.quiesce(lease)
        else:
            self.store.release(lease)

    def tell_routers(self, key: HandoffKey, reason: str) -> None:
        """A failure is worth telling: the request can start to recompute now instead of at prefill's timeout."""
        if reason:
            self._log_failure(key[0], reason)
            self.ports.to_routers(HandoffFailed(handoff_id=key[0], attempt=key[1], reason=reason))

    def _log_failure(self, handoff_id: bytes, reason: str) -> None:
        """Some each second: all those of a broken lane would push out of the log why it broke."""
        if ROUTER_SAYS in reason:
            return  # a client that left, or an answer that needed nothing more
        second = self.ports.trace_clock_ns() // 1_000_000_000
        if second != self.log_second:
            self.log_second, self.logged = second, 0
        self.logged += 1
        if self.logged <= LOGGED_A_SECOND:
            log.info("handoff %s failed: %r", handoff_id.hex(), reason)

    def bury(self, key: HandoffKey, reason: str) -> None:
        self.tombstones[key] = reason
        self.stirred[key] = None
        if len(self.tombstones) > TOMBSTONES_MAX:
            del self.tombstones[next(iter(self.tombstones))]

    def stale(self, message: Message) -> None:
        self.ports.counters[f"stale_{type(message).__name__.lower()}"] += 1

    def trace(self, key: HandoffKey, what: str, *, at_ns: int = 0, **details: object) -> None:
        """`at_ns`: when it happened, if not just now."""
        self.ports.tracer.note(key[0], what, at_ns or self.ports.trace_clock_ns(), **details)


def namespace_for(engine: Engine, tenant: bytes) -> bytes:
    """Under which name the store keeps blocks that this engine computes for a tenant."""
    return space_of(engine.info.content, engine.info.layout) + tenant
