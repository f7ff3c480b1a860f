"""What goes wrong in a simulated world, when, and for how long. All of it is drawn from the world's chance."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.simulate.clients import Clients
from benchmarks.simulate.engine import SimulatedEngine
from benchmarks.simulate.host import Host
from benchmarks.simulate.lane import Network
from benchmarks.simulate.router import SimulatedRouter
from benchmarks.simulate.world import World

PAUSE_S = 0.25  # between two faults, on average, in a world that is neither mild nor cruel
STOP_S = 6.0  # the longest SIGSTOP: three leases, two silences


class Faults:
    """Fate. `heal` ends it: nothing new breaks, and what is broken is mended or started again."""

    def __init__(
        self,
        world: World,
        network: Network,
        hosts: dict[str, Host],
        engines: dict[str, SimulatedEngine],
        router: SimulatedRouter,
        clients: Clients,
    ) -> None:
        self._world = world
        self._network = network
        self._hosts = hosts
        self._engines = engines
        self._router = router
        self._clients = clients
        self._over = False
        network.spoil_chance = world.chance.choice([0.0, 0.01, 0.05, 0.05])
        world.loss_chance = world.chance.choice([0.0, 0.0, 0.003, 0.02])
        self._ways: list[tuple[str, float, Callable[[], None]]] = [
            ("engine killed", 2.0, self._kill_engine),
            ("engine stopped", 2.0, self._stop_engine),
            ("worker stopped", 2.0, self._stop_worker),
            ("engine slow", 1.0, self._slow_engine),
            ("engine slow in letting go", 1.0, self._slow_let_go),
            ("engine's messages lost", 2.0, lambda: self._engine().lose_messages()),
            ("daemon killed", 0.3, self._kill_daemon),
            ("daemon stopped", 1.0, self._stop_daemon),
            ("control link broken", 1.5, self._break_control),
            ("control link cut", 1.0, self._cut_control),
            ("lane broken", 2.0, self._break_lane),
            ("lane cut", 1.0, self._cut_lane),
            ("lane slow", 1.0, self._slow_lane),
            ("router killed", 0.3, self._kill_router),
            ("router stopped", 0.5, self._stop_router),
            ("deadline storm", 1.0, self._storm),
        ]
        # Each world has its own mix, some faults never coming: mixed evenly, they hide each other.
        self._weights = [weight * world.chance.choice([0.0, 0.5, 1.0, 3.0]) for _, weight, _ in self._ways]
        self._pause_s = PAUSE_S * world.chance.choice([0.3, 1.0, 1.0, 3.0])
        self._next()

    def heal(self) -> None:
        self._over = True
        self._network.spoil_chance = self._world.loss_chance = 0.0
        self._network.slowness = 1.0

    def _next(self) -> None:
        self._world.later(self._pause_s * self._world.chance.expovariate(1.0), self._strike)

    def _strike(self) -> None:
        if self._over:
            return
        chance = self._world.chance
        name, _, strike = chance.choices(self._ways, self._weights)[0]
        self._world.counts[f"faults: {name}"] += 1
        self._world.note("fate", name)
        strike()
        self._next()

    def _engine(self) -> SimulatedEngine:
        return self._world.chance.choice(list(self._engines.values()))

    def _host(self) -> Host:
        return self._world.chance.choice(list(self._hosts.values()))

    def _short_s(self, longest_s: float) -> float:
        """Mostly much shorter than the longest."""
        return longest_s * self._world.chance.random() ** 2

    # --- engines ----------------------------------------------------------------------------------------------

    def _kill_engine(self) -> None:
        engine, chance = self._engine(), self._world.chance
        if not engine.alive or not engine.worker.alive:
            return
        apart_s = chance.choice([0.0, 0.05, 0.5])
        engine.kill(worker_first=chance.random() < 0.5, apart_s=apart_s)
        self._world.later(apart_s + 0.01 + chance.random(), engine.restart)

    def _stop_engine(self) -> None:
        engine, seconds = self._engine(), self._short_s(STOP_S)
        engine.stop_for(seconds)
        engine.worker.stop_for(seconds)

    def _stop_worker(self) -> None:
        self._engine().worker.stop_for(self._short_s(STOP_S))

    def _slow_engine(self) -> None:
        worker = self._engine().worker
        worker.slowness = self._world.chance.choice([5.0, 50.0])
        self._world.later(1.0, setattr, worker, "slowness", 1.0)

    def _slow_let_go(self) -> None:
        engine = self._engine()
        engine.letting_go_s = self._short_s(5.0)
        self._world.later(3.0, setattr, engine, "letting_go_s", 0.0)

    # --- daemons ----------------------------------------------------------------------------------------------

    def _kill_daemon(self) -> None:
        host = self._host()
        if host.alive:
            host.crash()
            self._world.later(0.05 + self._world.chance.random(), host.restart)

    def _stop_daemon(self) -> None:
        self._host().stop_for(self._short_s(STOP_S))

    # --- the network ------------------------------------------------------------------------------------------

    def _break_control(self) -> None:
        here, there = self._world.chance.sample(list(self._hosts.values()), 2)
        if here.alive:
            here.break_link(there.name)

    def _cut_control(self) -> None:
        here, there = self._world.chance.sample(list(self._hosts.values()), 2)
        here.to_peers[there.name].cut_until = self._world.now + self._short_s(STOP_S)

    def _break_lane(self) -> None:
        here, there = self._world.chance.sample(list(self._hosts.values()), 2)
        ours, theirs = self._world.chance.choice(list(zip(here.lanes, there.lanes, strict=True)))
        ours.break_to(theirs.endpoint)

    def _cut_lane(self) -> None:
        self._network.cut_until = self._world.now + self._short_s(STOP_S)

    def _slow_lane(self) -> None:
        self._network.slowness = self._world.chance.choice([10.0, 300.0])
        self._world.later(1.0, setattr, self._network, "slowness", 1.0)

    # --- the router and its clients ---------------------------------------------------------------------------

    def _kill_router(self) -> None:
        if self._router.alive:
            self._router.die()
            self._world.later(0.05 + self._world.chance.random(), self._router.restart)

    def _stop_router(self) -> None:
        self._router.stop_for(self._short_s(3.0))

    def _storm(self) -> None:
        self._clients.storm_until = self._world.now + 0.5
