"""The seeded simulator: production state machines in a world where everything goes wrong, and checks after every event.

Production code: router journeys with their policy and seeds, handles, movers with both halves, sessions, stores with
slots and leases, headers, windows. Simulated: time, network, lanes, processes, engines, clients. An episode is a world
of its own, a function of its seed: some hundred handoffs among faults, then everything is healed, and whatever is
left over at the end is a leak.
"""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.simulate.breaks import PRODUCTION, Parts
from benchmarks.simulate.clients import Clients
from benchmarks.simulate.engine import SimulatedEngine
from benchmarks.simulate.faults import Faults
from benchmarks.simulate.host import Host
from benchmarks.simulate.lane import Network
from benchmarks.simulate.prompts import BLOCK_TOKENS, MODEL, PAGES
from benchmarks.simulate.router import SimulatedRouter
from benchmarks.simulate.watch import Watch, unfinished_slots
from benchmarks.simulate.world import Violation, World
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.wire import EngineInfo

AUDIT_EVENTS = 400  # a full audit costs as much as some ten events
SETTLE_S = 40.0  # after the last answer: every budget, lease and stop has run out long before
# No episode has so many: somebody waits for ever, or two go on and on about it.
EPISODE_S_MAX, EVENTS_MAX = 3600.0, 1_000_000

# Two hosts, so that handoffs go over the lane or stay within a daemon; engines of role both claim for both sides.
Role = Literal["prefill", "decode", "both"]
FLEETS: tuple[dict[str, tuple[Role, str]], ...] = (
    {"pa": ("prefill", "a"), "da": ("decode", "a"), "pb": ("prefill", "b"), "db": ("decode", "b")},
    {"pa": ("prefill", "a"), "da": ("decode", "a"), "db": ("decode", "b"), "bb": ("both", "b")},
    {"pa": ("prefill", "a"), "db": ("decode", "b"), "dc": ("decode", "b")},
)


@dataclass
class Outcome:
    """What became of one episode."""

    seed: int
    handoffs: int = 0
    events: int = 0
    fingerprint: str = ""
    finding: str = ""  # empty: every invariant held
    kind: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)  # the last events before a finding


def run_episode(seed: int, *, handoffs: int, parts: Parts = PRODUCTION) -> Outcome:
    """One world from its beginning to its end. Findings are in the outcome, whatever the machines raise included."""
    episode = Episode(seed, handoffs=handoffs, parts=parts)
    outcome, world = Outcome(seed), episode.world
    try:
        episode.run()
    except Violation as violation:
        outcome.finding, outcome.kind = str(violation), violation.kind
    except Exception as error:  # noqa: BLE001 - any is a finding, and the run goes on
        lines = traceback.format_exception(error)
        outcome.finding, outcome.kind = f"unsafe: {type(error).__name__}: {error}", "unsafe"
        world.note("bug", "".join(lines))
    if outcome.finding:
        outcome.trace = [f"{at:10.4f}  {who:10} {what}" for at, who, what in world.trace]
    outcome.handoffs, outcome.events, outcome.counts = episode.clients.handoffs, world.events, dict(world.counts)
    outcome.fingerprint = world.fingerprint
    return outcome


class Episode:
    """A world with two hosts, some engines, a router and its clients."""

    def __init__(
        self, seed: int, *, handoffs: int, parts: Parts = PRODUCTION, audit_events: int = AUDIT_EVENTS
    ) -> None:
        self._audit_events = audit_events
        self.world = world = World(random.Random(seed))
        chance = world.chance
        self.network = Network()
        self.hosts = {
            name: Host(world, self.network, parts, name, extents=chance.choice([1, 2, 2, 4])) for name in "ab"
        }
        for host in self.hosts.values():
            for other in self.hosts.values():
                host.meet(other)
        self.engines: dict[str, SimulatedEngine] = {}
        self.router = SimulatedRouter(world, self.hosts, self.engines)
        for name, (role, host_name) in chance.choice(FLEETS).items():
            self.engines[name] = SimulatedEngine(world, parts, self.hosts[host_name], _info(name, role))
        self.clients = Clients(world, self.router, people=chance.choice([2, 6, 12]), handoffs=handoffs)
        self.faults = Faults(world, self.network, self.hosts, self.engines, self.router, self.clients)
        self._watch = {name: Watch(host) for name, host in self.hosts.items()}

    def run(self) -> None:
        """Raises Violation, and whatever the machines raise."""
        world = self.world
        while self.clients.busy:
            self._some_events()
            if world.now > EPISODE_S_MAX or world.events > EVENTS_MAX:
                raise Violation("late", f"{self.clients.busy} clients still wait after {world.events} events")
        self.faults.heal()
        end = world.now + SETTLE_S
        while world.now < end and (self._left_over() or world.now < end - SETTLE_S + 2.0):
            self._some_events()
        left = self._left_over()
        if left:
            raise Violation("leaked", "; ".join(left))
        for host in self.hosts.values():
            world.counts.update({f"daemons: {name}": n for name, n in (host.totals + host.counters).items()})

    def _some_events(self) -> None:
        step = self.world.step
        for _ in range(self._audit_events):
            step()
        for watch in self._watch.values():
            watch.audit()

    def _left_over(self) -> list[str]:
        """What should not be there when all is quiet."""
        left = [f"{conductor.journey!r}" for conductor in self.router.conductors.values()]
        for host in self.hosts.values():
            left += [f"{host.name}: {half}" for half in host.handoffs.describe()]
            left += [f"{host.name}: {lease}" for lease in host.store.leases.values()]
            if unfinished := unfinished_slots(host):
                left.append(f"{host.name}: {unfinished} slots that are neither cache nor free")
            if host.handoffs.reservations_waiting:
                left.append(f"{host.name}: {host.handoffs.reservations_waiting} wait for room")
            if windows := sum(lane.windows_open for lane in host.lanes):
                left.append(f"{host.name}: {windows} windows")
            if host.arena.touchers:
                left.append(f"{host.name}: an engine believes that it may touch {len(host.arena.touchers)} blocks")
        return left


def _info(name: str, role: Role) -> EngineInfo:
    content = ContentFingerprint(
        model=MODEL, weights="w", weight_epoch="", dtype="bf16", block_tokens=BLOCK_TOKENS, hash_algorithm="sha"
    )
    layout = LayoutFingerprint(
        engine="sim", attention="none", layers=PAGES.layers, page_bytes=PAGES.page_bytes, block_tokens=BLOCK_TOKENS,
        packing="L", kv_groups=1, ranks=1, chunk_blocks=1,
    )  # fmt: skip
    return EngineInfo(engine_id=name, role=role, model=MODEL, url="http://sim", content=content, layout=layout)
