"""Virtual time: who does what when. Knows processes that stop and die, and connections; nothing of KV.

All that happens is an event of the heap, and all chance comes from one seeded generator: a run is a function of its
seed. A process that is stopped (as by SIGSTOP) gets its events late and in order; one that has died gets none.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal

import xxhash

from pdx.errors import PdxError
from pdx.wire import encode

EVENTS_KEPT = 400  # of the trace, for the report of a failure: some ten handoffs with all their messages

BYTES_CHANCE = 0.125  # of a world whose messages are encoded and decoded, which takes its time


Kind = Literal["wrong", "late", "leaked", "unsafe"]


class Violation(PdxError):
    """An invariant does not hold: a bug of the machines under test, or the proof that a broken variant is broken.

    wrong: a request got what is not its own. late: something outlived its budget. leaked: something was left over.
    unsafe: somebody touches, or may touch, what is not theirs any more.
    """

    def __init__(self, kind: Kind, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class World:
    """The clock, the heap, and what is counted and noted."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now = 0.0
        self.events = 0
        self.loss_chance = 0.0  # of any message on a lossy link: a full queue drops silently
        self.sends_bytes = chance.random() < BYTES_CHANCE
        self.counts: Counter[str] = Counter()
        self.trace: deque[tuple[float, str, str]] = deque(maxlen=EVENTS_KEPT)
        self._fingerprint = xxhash.xxh3_64()
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Process | None, int, Callable[..., None], tuple[Any, ...]]] = []

    def later(self, delay_s: float, act: Callable[..., None], *details: Any) -> None:
        """An event of nobody's: the network's, or fate's."""
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), None, 0, act, details))

    def at(self, at: float, process: Process, act: Callable[..., None], *details: Any) -> None:
        heapq.heappush(self._heap, (at, next(self._order), process, process.life, act, details))

    def step(self) -> bool:
        """The next event happens. False if there is none."""
        if not self._heap:
            return False
        at, _, process, life, act, details = heapq.heappop(self._heap)
        self.now = at
        if process is not None:
            if process.life != life or not process.alive:
                return True
            if process.asleep_until > at:
                entry = (process.asleep_until, next(self._order), process, life, act, details)
                heapq.heappush(self._heap, entry)
                return True
        self.events += 1
        act(*details)
        return True

    def note(self, who: str, what: str) -> None:
        """For the trace, and for its fingerprint: two runs of one seed agree in every note."""
        self.trace.append((self.now, who, what))
        self._fingerprint.update(f"{self.now:.9f}{who}{what}".encode())

    @property
    def fingerprint(self) -> str:
        return self._fingerprint.hexdigest()


class Process:
    """Something that can be stopped and killed. A new life hears nothing of what was meant for the old one."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 1
        self.alive = True
        self.asleep_until = 0.0
        self._stopped_s = 0.0

    def later(self, delay_s: float, act: Callable[..., None], *details: Any) -> None:
        self.world.at(self.world.now + delay_s, self, act, *details)

    def stop_for(self, seconds: float) -> None:
        """No-op while it is stopped: what waits for it must keep its order."""
        if self.asleep_until <= self.world.now:
            self.asleep_until = self.world.now + seconds
            self._stopped_s += seconds

    @property
    def stopped_s(self) -> float:
        """For how long it has been stopped by now, in all its lives."""
        return self._stopped_s - max(0.0, self.asleep_until - self.world.now)

    def die(self) -> None:
        self._stopped_s = self.stopped_s
        self.alive = False
        self.life += 1
        self.asleep_until = 0.0

    def be_born(self) -> None:
        self.life += 1
        self.alive = True


class Link:
    """One direction of one connection, as ZeroMQ keeps it: in order, and a break loses what is on its way.

    While it is cut, messages wait: they arrive late when it is mended.
    """

    def __init__(
        self,
        world: World,
        to: Process,
        hear: Callable[[Any], None],
        *,
        delay_s: float,
        decode: Callable[[bytes], Any] | None = None,
        lossy: bool = False,
    ) -> None:
        """`decode` is that of the conversation: some worlds send bytes, as the real ones do."""
        self._world = world
        self._decode = decode if world.sends_bytes else None
        self._to = to
        self._lossy = lossy
        self._hear = hear
        self._delay_s = delay_s
        self._connection = 0
        self._last_at = 0.0
        self.cut_until = 0.0

    def send(self, message: Any) -> None:
        world = self._world
        if self._lossy and world.loss_chance and world.chance.random() < world.loss_chance:
            return
        if self._decode is not None:
            message = self._decode(encode(message))
        delay_s = self._delay_s * (0.5 + world.chance.random())
        self._last_at = max(self._last_at, max(world.now, self.cut_until) + delay_s)
        world.at(self._last_at, self._to, self._arrive, self._connection, message)

    def lose(self) -> None:
        """The connection breaks: nothing that is on its way arrives. The next message makes a new one."""
        self._connection += 1

    def _arrive(self, connection: int, message: Any) -> None:
        if connection == self._connection:
            self._hear(message)
