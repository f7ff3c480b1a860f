"""`make soak`: thousands of handoffs between real daemons while engines and daemons are killed and stopped.

Engines are page engines (tests/page_engine.py): the real connector halves, no model, and every row of KV that is read is
checked. The seed fixes what is asked and what breaks in each burst, not the timing. After each burst everything is
healed and must be quiet, whole and free. A run that was interrupted goes on with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing.connection
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.report import HISTORY, Report
from benchmarks.rig import REPOSITORY, wait_until
from benchmarks.soak_parts import Answered, Engine, GivenUp, Host, Prompted
from pdx.handoff.handle import TransferHandle, mint
from pdx.launch import processes
from pdx.wire import Budgets, Role

sys.path.insert(0, str(REPOSITORY / "tests"))  # the page engine is one of the tests' engines; its process inherits this

BURST = 200  # handoffs between two looks at everything
AT_ONCE = 12
ANSWER_TOKENS = 3
STUCK_S = 60.0  # no answer for so long, faults and all, is a failure; budgets and leases end within 8 s
STOP_S = (0.2, 4.0)  # shorter and longer than lease and slab budget
BUDGETS = Budgets(grant_s=2.0, slab_s=2.0, total_s=8.0, claim_s=1.0)
# 1 MiB holds some 15 prompts: reservations wait and cache is evicted all the time.
SETTINGS = {"arena": "1MiB", "linger_s": "2", "lease_s": "2", "digest_mode": "true", "poison": "true"}
# Each prefill engine has a decode engine at its own daemon and one at the other.
ENGINES: dict[str, tuple[Role, str]] = {
    "P0": ("prefill", "a"), "P1": ("prefill", "b"), "D0": ("decode", "b"), "D1": ("decode", "a"),
}  # fmt: skip
FDS_GROWN_MAX = 16  # connections to peers that come and go


class Progress(msgspec.Struct):
    """What --resume keeps."""

    seed: int
    bursts: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = {}


@dataclass(eq=False)
class Journey:
    """One request, from the client's side."""

    number: int
    tokens: list[int]
    prefill: str
    decode: str
    handle: str
    early: bool
    asked_at: float
    gives_up_at: float
    at_decode: bool = False


@dataclass(frozen=True)
class Fault:
    at: int  # after so many requests of the burst
    kind: str  # kill, stop
    victim: str  # an engine or a host
    seconds: float  # stopped; or dead until it is started again


class Failed(Exception):
    """Something that must hold does not. The message is the finding."""


class Burst:
    """BURST requests and the faults among them."""

    def __init__(self, soak: Soak, generator: random.Random, shared: list[list[int]]) -> None:
        self._soak, self._random, self._shared = soak, generator, shared
        victims = [*ENGINES, "a", "b"]
        self._faults = sorted(
            (
                Fault(generator.randrange(BURST), generator.choice(["kill", "stop"]), generator.choice(victims),
                      generator.uniform(*STOP_S))
                for _ in range(generator.randrange(5))
            ), key=lambda fault: fault.at,
        )  # fmt: skip
        self._heal: list[tuple[float, Fault]] = []
        self._under_way: dict[int, Journey] = {}
        self._asked = 0

    def run(self) -> None:
        while self._asked < BURST or self._under_way or self._heal:
            now = time.monotonic()
            self._heal_due(now)
            if self._faults and self._faults[0].at <= self._asked:
                self._break(self._faults.pop(0), now)
            if self._asked < BURST and len(self._under_way) < AT_ONCE:
                self._ask(now)
            self._hear()
            self._give_up(now)

    # --- requests ---------------------------------------------------------------------------------------------

    def _ask(self, now: float) -> None:
        engines, hosts = self._soak.engines, self._soak.hosts
        prefill, decode = self._random.choice(["P0", "P1"]), self._random.choice(["D0", "D1"])
        early, patient = self._random.random() < 0.5, self._random.random() < 0.95
        start = self._random.choice(self._shared)[: self._random.randrange(40)] if self._random.random() < 0.5 else []
        tokens = start + [self._random.randrange(97) for _ in range(self._random.randrange(1, 50))]
        gives_up_at = now + (STUCK_S * 2 if patient else self._random.uniform(0.0, 0.2))
        if not (engines[prefill].ready and engines[decode].ready):
            return  # the request was drawn all the same: what is asked later does not depend on it
        handle = TransferHandle(
            handoff_id=os.urandom(16), attempt=1, prefill_engine=prefill, decode_engine=decode,
            prefill_daemon=hosts[ENGINES[prefill][1]].ref, decode_daemon=hosts[ENGINES[decode][1]].ref,
            budgets=BUDGETS, issued_unix_s=time.time(),
        )  # fmt: skip
        text = mint(handle, self._soak.key)
        self._asked += 1
        number = self._soak.next_number()
        journey = Journey(number, tokens, prefill, decode, text, early, now, gives_up_at)
        self._under_way[journey.number] = journey
        engines[prefill].say(Prompted(journey.number, tokens, 1, text, sends=True))
        if early:
            self._to_decode(journey)

    def _to_decode(self, journey: Journey) -> None:
        journey.at_decode = True
        engine = self._soak.engines[journey.decode]
        engine.say(Prompted(journey.number, journey.tokens, ANSWER_TOKENS, journey.handle))

    def _hear(self) -> None:
        engines = self._soak.engines
        pipes = [engine.pipe for engine in engines.values() if not engine.pipe.closed]
        multiprocessing.connection.wait(pipes, 0.005)
        for engine in engines.values():
            try:
                for answer in engine.hear() if not engine.pipe.closed else ():
                    self._answered(engine, answer)
            except EOFError:
                raise Failed(f"engine {engine.name} ended by itself") from None

    def _answered(self, engine: Engine, answer: Answered) -> None:
        from page_engine import answer_to

        if answer.wrong:
            raise Failed(f"engine {engine.name} read wrong pages: {answer.wrong}")
        journey = self._under_way.get(answer.number)
        if journey is None:
            return
        if answer.output != answer_to(journey.tokens, len(answer.output)):
            raise Failed(f"engine {engine.name} answered {journey.tokens} with {answer.output}")
        if engine.role == "decode":
            self._over(journey, "answered")
        elif not journey.at_decode:
            self._to_decode(journey)

    def _give_up(self, now: float) -> None:
        for journey in list(self._under_way.values()):
            if now >= journey.gives_up_at:
                for name in (journey.prefill, journey.decode):
                    self._soak.engines[name].say(GivenUp(journey.number))
                self._over(journey, "given up")
            elif now - journey.asked_at > STUCK_S:
                raise Failed(f"request {journey.number} of {journey.prefill} and {journey.decode} is stuck")

    def _over(self, journey: Journey, how: str) -> None:
        del self._under_way[journey.number]
        self._soak.count(how)

    # --- faults -----------------------------------------------------------------------------------------------

    def _break(self, fault: Fault, now: float) -> None:
        if any(other.victim == fault.victim for _, other in self._heal):
            return  # it is broken already
        self._soak.count(f"{fault.kind} {'daemon' if fault.victim in self._soak.hosts else 'engine'}")
        self._heal.append((now + fault.seconds, fault))
        if fault.victim in self._soak.hosts:
            host = self._soak.hosts[fault.victim]
            host.kill() if fault.kind == "kill" else host.signal(signal.SIGSTOP)
        elif fault.kind == "stop":
            self._soak.engines[fault.victim].signal(signal.SIGSTOP)
        else:
            self._kill_engine(self._soak.engines[fault.victim])

    def _kill_engine(self, engine: Engine) -> None:
        engine.end()
        for journey in list(self._under_way.values()):
            if journey.decode == engine.name and journey.at_decode:
                self._over(journey, "lost")
            elif journey.prefill == engine.name and not journey.at_decode:
                self._to_decode(journey)

    def _heal_due(self, now: float) -> None:
        for due, fault in list(self._heal):
            if now >= due:
                self._heal.remove((due, fault))
                if fault.kind == "stop":
                    (self._soak.hosts.get(fault.victim) or self._soak.engines[fault.victim]).signal(signal.SIGCONT)
                elif fault.victim in self._soak.engines:
                    self._soak.start_engine(fault.victim)


class Soak:
    """The parts, and one burst after the other until enough has been seen."""

    def __init__(self, scratch: Path, progress: Progress) -> None:
        self.progress = progress
        self.key = secrets.token_bytes(32)
        key_file = scratch / "cluster.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(self.key)
        self._scratch = scratch
        self._counts = Counter(progress.counts)
        self._number = 0
        self.hosts = {n: Host(n, scratch / n, key_file=str(key_file), **SETTINGS) for n in "ab"}
        self.engines: dict[str, Engine] = {}
        for name in ENGINES:
            self.start_engine(name)

    def start_engine(self, name: str) -> None:
        role, host = ENGINES[name]
        self.engines[name] = Engine(name, role, self.hosts[host], log=self._scratch / f"{name}.log")

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def count(self, what: str) -> None:
        self._counts[what] += 1
        self.progress.counts = dict(self._counts)

    @property
    def handoffs(self) -> int:
        return sum(self._counts[how] for how in ("answered", "given up", "lost"))

    def burst(self) -> None:
        """Raises Failed or TimeoutError."""
        begun = time.monotonic()
        generator = random.Random(f"{self.progress.seed}/{self.progress.bursts}")
        shared = [[generator.randrange(97) for _ in range(40)] for _ in range(4)]
        Burst(self, generator, shared).run()
        self._look()
        self.progress.bursts += 1
        self.progress.seconds += time.monotonic() - begun

    def _look(self) -> None:
        """Everything is healed and nothing is asked: everything must be there, free and whole."""
        for host in self.hosts.values():
            complaint = host.complaint()
            if complaint:
                raise Failed(complaint)
            if len(self._daemons(host)) != 1:
                raise Failed(f"daemons of {host.name}: {self._daemons(host)}")
            if host.fds_grown() > FDS_GROWN_MAX:
                raise Failed(f"daemon {host.name} holds {host.fds_grown()} descriptors more than at first")

    def _daemons(self, host: Host) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"--run-dir={host.flags['run_dir']}".encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def close(self) -> list[int]:
        """Ends everything. Returns processes that are left."""
        for engine in self.engines.values():
            if not engine.pipe.closed:
                engine.end()
        for host in self.hosts.values():
            with contextlib.suppress(OSError):
                host.signal(signal.SIGCONT)
            host.close()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(self._daemons(host) for host in self.hosts.values()), 20, "daemons linger out")
        left = [pid for host in self.hosts.values() for pid in self._daemons(host)]
        processes.kill(left)
        return left
