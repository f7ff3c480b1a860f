"""One burst of the soak: requests between page engines, and what breaks among them. All of it drawn beforehand."""

from __future__ import annotations

import multiprocessing.connection
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from benchmarks.soak.parts import Answered, Engine, GivenUp, Host, Prompted, WireFault, answer_to
from pdx.handoff.handle import TransferHandle, mint
from pdx.wire import Budgets, Role

BURST = 200  # handoffs between two looks at everything
PROCESS_FAULTS, WIRE_FAULTS = 8, 10  # fewer than so many of each in a burst
AT_ONCE = 12
ANSWER_TOKENS = 3
VOCABULARY = 97
STUCK_S = 60.0  # no answer for so long, faults and all, is a failure; budgets and leases end within 8 s
PROCESS_KINDS = ("kill", "stop")
STRIKE_LOG2_BYTES = (4.0, 19.0)  # within the greeting, or after some handoffs: one has up to 150 KB
STOP_S = (0.2, 4.0)  # shorter and longer than lease and slab budget
PATIENCE_S = (0.0, 0.2)  # of one client in twenty
BUDGETS = Budgets(grant_s=2.0, slab_s=2.0, total_s=8.0, claim_s=1.0)
# Each prefill engine has a decode engine at its own daemon and one at the other.
ENGINES: dict[str, tuple[Role, str]] = {
    "P0": ("prefill", "a"), "P1": ("prefill", "b"), "D0": ("decode", "b"), "D1": ("decode", "a"),
}  # fmt: skip


class Failed(Exception):
    """Something that must hold does not. The message is the finding."""


@dataclass(frozen=True)
class Wish:
    """What a client wants."""

    tokens: list[int]
    prefill: str
    decode: str
    early: bool  # decode hears of it at once, not only after prefill's answer
    patience_s: float


@dataclass(eq=False)
class Journey:
    """One request under way."""

    number: int
    wish: Wish
    handle: str
    asked_at: float
    at_decode: bool = False


@dataclass(frozen=True)
class Fault:
    at: int  # after so many requests of the burst
    kind: str  # kill, stop; or what is wrong with the wire
    victim: str  # an engine or a host; of a wire, the host that it leads to
    seconds: float  # stopped; dead until it is started again; or until the wire is mended, which cuts it
    after_bytes: int = 0  # a wire's fault strikes

    @property
    def on_wire(self) -> bool:
        return self.kind not in PROCESS_KINDS


class Parts(Protocol):
    """What a burst uses and breaks."""

    engines: dict[str, Engine]
    hosts: dict[str, Host]
    key: bytes
    wire_faults: Sequence[WireFault]

    def start_engine(self, name: str) -> None: ...
    def next_number(self) -> int: ...
    def count(self, what: str) -> None: ...


class Burst:
    """BURST requests and the faults among them. `run` raises Failed for a wrong answer or none."""

    def __init__(self, parts: Parts, generator: random.Random) -> None:
        self._parts = parts
        shared = [[generator.randrange(VOCABULARY) for _ in range(40)] for _ in range(4)]
        self._wishes = [_wish(generator, shared) for _ in range(BURST)]
        faults = [_process_fault(generator) for _ in range(generator.randrange(PROCESS_FAULTS))]
        faults += [_wire_fault(generator, parts.wire_faults) for _ in range(generator.randrange(WIRE_FAULTS))]
        self._faults = sorted(faults, key=lambda fault: fault.at)
        self._heal: list[tuple[float, Fault]] = []
        self._under_way: dict[int, Journey] = {}

    def run(self) -> None:
        while self._wishes or self._under_way or self._heal:
            now = time.monotonic()
            self._heal_due(now)
            if self._faults and self._faults[0].at <= BURST - len(self._wishes):
                self._break(self._faults.pop(0), now)
            if self._wishes and len(self._under_way) < AT_ONCE:
                self._ask(now)
            self._hear()
            self._give_up(now)

    # --- requests ---------------------------------------------------------------------------------------------

    def _ask(self, now: float) -> None:
        engines, wish = self._parts.engines, self._wishes[-1]
        if not (engines[wish.prefill].ready and engines[wish.decode].ready):
            return
        self._wishes.pop()
        here, there = (self._parts.hosts[ENGINES[name][1]] for name in (wish.prefill, wish.decode))
        handle = TransferHandle(
            handoff_id=os.urandom(16), attempt=1, prefill_engine=wish.prefill, decode_engine=wish.decode,
            prefill_daemon=here.ref, decode_daemon=there.ref_for(here), budgets=BUDGETS, issued_unix_s=time.time(),
        )  # fmt: skip
        journey = Journey(self._parts.next_number(), wish, mint(handle, self._parts.key), now)
        self._under_way[journey.number] = journey
        engines[wish.prefill].say(Prompted(journey.number, wish.tokens, 1, journey.handle, sends=True))
        if wish.early:
            self._to_decode(journey)

    def _to_decode(self, journey: Journey) -> None:
        journey.at_decode = True
        engine = self._parts.engines[journey.wish.decode]
        if engine.ended:
            self._over(journey, "lost")
            return
        engine.say(Prompted(journey.number, journey.wish.tokens, ANSWER_TOKENS, journey.handle))

    def _hear(self) -> None:
        engines = self._parts.engines
        pipes = [engine.pipe for engine in engines.values() if not engine.ended]
        multiprocessing.connection.wait(pipes, 0.005)
        for engine in engines.values():
            try:
                for answer in engine.hear():
                    self._answered(engine, answer)
            except EOFError:
                raise Failed(f"engine {engine.name} ended by itself") from None

    def _answered(self, engine: Engine, answer: Answered) -> None:
        if answer.wrong:
            raise Failed(f"engine {engine.name} read wrong pages: {answer.wrong}")
        journey = self._under_way.get(answer.number)
        if journey is None:
            return
        if answer.output != answer_to(journey.wish.tokens, len(answer.output)):
            raise Failed(f"engine {engine.name} answered {journey.wish.tokens} with {answer.output}")
        if engine.role == "decode":
            self._over(journey, "answered")
        elif not journey.at_decode:
            self._to_decode(journey)

    def _give_up(self, now: float) -> None:
        for journey in list(self._under_way.values()):
            if now - journey.asked_at >= journey.wish.patience_s:
                for name in (journey.wish.prefill, journey.wish.decode):
                    self._parts.engines[name].say(GivenUp(journey.number))
                self._over(journey, "given up")
            elif now - journey.asked_at > STUCK_S:
                raise Failed(f"request {journey.number} of {journey.wish.prefill} and {journey.wish.decode} is stuck")

    def _over(self, journey: Journey, how: str) -> None:
        del self._under_way[journey.number]
        self._parts.count(how)

    # --- faults -----------------------------------------------------------------------------------------------

    def _break(self, fault: Fault, now: float) -> None:
        if any((other.victim, other.on_wire) == (fault.victim, fault.on_wire) for _, other in self._heal):
            return  # it is broken already
        self._heal.append((now + fault.seconds, fault))
        if fault.on_wire:
            self._parts.hosts[fault.victim].spoil(cast(WireFault, fault.kind), after_bytes=fault.after_bytes)
            return
        self._parts.count(f"{fault.kind} {'daemon' if fault.victim in self._parts.hosts else 'engine'}")
        if fault.victim in self._parts.hosts:
            host = self._parts.hosts[fault.victim]
            host.kill() if fault.kind == "kill" else host.stop()
        elif fault.kind == "stop":
            self._parts.engines[fault.victim].stop()
        else:
            self._kill_engine(self._parts.engines[fault.victim])

    def _kill_engine(self, engine: Engine) -> None:
        engine.end()
        for journey in list(self._under_way.values()):
            if journey.wish.decode == engine.name and journey.at_decode:
                self._over(journey, "lost")
            elif journey.wish.prefill == engine.name and not journey.at_decode:
                self._to_decode(journey)

    def _heal_due(self, now: float) -> None:
        for due, fault in list(self._heal):
            if now >= due:
                self._heal.remove((due, fault))
                if fault.on_wire:
                    struck = self._parts.hosts[fault.victim].mend()
                    self._parts.count(f"{fault.kind if struck else 'cut'} wire")
                elif fault.kind == "stop":
                    (self._parts.hosts.get(fault.victim) or self._parts.engines[fault.victim]).resume()
                elif fault.victim in self._parts.engines:
                    self._parts.start_engine(fault.victim)


def _wish(generator: random.Random, shared: list[list[int]]) -> Wish:
    start = generator.choice(shared)[: generator.randrange(40)] if generator.random() < 0.5 else []
    return Wish(
        tokens=start + [generator.randrange(VOCABULARY) for _ in range(generator.randrange(1, 50))],
        prefill=generator.choice(["P0", "P1"]),
        decode=generator.choice(["D0", "D1"]),
        early=generator.random() < 0.5,
        patience_s=generator.uniform(*PATIENCE_S) if generator.random() < 0.05 else STUCK_S * 2,
    )


def _process_fault(generator: random.Random) -> Fault:
    return Fault(
        at=generator.randrange(BURST),
        kind=generator.choice(PROCESS_KINDS),
        victim=generator.choice([*ENGINES, "a", "b"]),
        seconds=generator.uniform(*STOP_S),
    )


def _wire_fault(generator: random.Random, kinds: Sequence[WireFault]) -> Fault:
    return Fault(
        at=generator.randrange(BURST),
        kind=generator.choice(kinds),
        victim=generator.choice(["a", "b"]),
        seconds=generator.uniform(*STOP_S),
        after_bytes=int(2 ** generator.uniform(*STRIKE_LOG2_BYTES)),
    )
