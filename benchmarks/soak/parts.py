"""What the soak starts and breaks: page engines in processes of their own, and the daemons that they attach to.

Daemons are started by whoever misses one first, as in production, and are nobody's child here.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.harness.rig import REPOSITORY, wait_until
from pdx.client import DaemonClient
from pdx.config import INFO_NAME, Config, load
from pdx.errors import DaemonGone
from pdx.transport.conformance_faults import Fault as WireFault
from pdx.transport.conformance_faults import Hazard
from pdx.wire import Ask, Attach, DaemonRef, Role

sys.path.insert(0, str(REPOSITORY / "tests"))  # the page engine is one of the tests' engines

from page_engine import PageEngine, answer_to
from torch_engine import Request
from torch_peer import TorchPeer

__all__ = ["Answered", "Engine", "GivenUp", "Host", "Prompted", "WireFault", "answer_to"]

PREEMPT = 0.01  # chance of a preemption in a step
IDLE_S = 0.02  # an idle engine looks this often for requests, and steps: a load may still be ending
QUIET_S = 45.0  # what a killed peer may still write on a one-sided lane is waited for 30 s
# A server that has loaded torch forks an engine in 50 ms; a fresh interpreter would take two seconds.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch"])


class Prompted(msgspec.Struct, frozen=True, tag=True):
    """To an engine: a request. Without a handle it is computed from nothing."""

    number: int
    tokens: list[int]
    max_tokens: int
    handle: str = ""
    sends: bool = False


class GivenUp(msgspec.Struct, frozen=True, tag=True):
    number: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From an engine: it is attached."""


class Answered(msgspec.Struct, frozen=True, tag=True):
    number: int
    output: list[int]
    wrong: list[str]  # rows of KV that were read and were not those of this engine's text


_decode = msgspec.msgpack.Decoder(Prompted | GivenUp | Ready | Answered).decode
_encode = msgspec.msgpack.encode


class Engine:
    """One engine process, to be killed, stopped and started again."""

    def __init__(self, name: str, role: Role, host: Host, *, log: Path) -> None:
        self.name, self.role, self.host = name, role, host
        self.ready = False
        self.pipe, theirs = _forks.Pipe()
        self.process = _forks.Process(target=_run, args=(theirs, name, role, host.flags, log), daemon=True)
        self.process.start()
        theirs.close()

    def say(self, message: Prompted | GivenUp) -> None:
        """To a dead process it is lost."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(_encode(message))

    @property
    def ended(self) -> bool:
        return self.pipe.closed

    def hear(self) -> list[Answered]:
        """Answers that have come. Raises EOFError if the process ended by itself."""
        answers: list[Answered] = []
        try:
            while not self.ended and self.pipe.poll():
                message = _decode(self.pipe.recv_bytes())
                if isinstance(message, Ready):
                    self.ready = True
                elif isinstance(message, Answered):
                    answers.append(message)
        except ConnectionResetError as error:
            raise EOFError from error
        return answers

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """kill -9, and everything that this process holds of it is given back."""
        self.ready = False
        self.process.kill()
        self.process.join(10)
        self.process.close()
        self.pipe.close()


class Host:
    """One daemon after the other in one run directory."""

    def __init__(self, name: str, run_dir: Path, **settings: str) -> None:
        self.name = name
        self.flags = {"run_dir": str(run_dir), **settings}
        self.counters: Counter[str] = Counter()  # of the daemons before this one
        self._config = settings_of(self.flags)
        self._tool: DaemonClient | None = None
        self._stopped = 0  # pid
        self._way: Hazard | None = None
        self._flipped_bits = 0  # of what was put here

    @property
    def tool(self) -> DaemonClient:
        """Starts a daemon if there is none. Blocks while it starts."""
        if self._tool is None or not self._tool.alive:
            if self._tool is not None:
                self._tool.close()
            self._tool = DaemonClient.attach(self._config, Attach(kind="tool"), deadline_s=QUIET_S)
        return self._tool

    @property
    def ref(self) -> DaemonRef:
        return self.tool.attached.daemon

    def ref_for(self, other: Host) -> DaemonRef:
        """As the other host is told of it: puts take the way that something is wrong with, if there is one."""
        way = self._way
        if way is None or other is self:
            return self.ref
        lanes = [msgspec.structs.replace(lane, endpoint=way.endpoint) if lane.scheme == way.scheme else lane
                 for lane in self.ref.lanes]  # fmt: skip
        return msgspec.structs.replace(self.ref, lanes=lanes)

    def spoil(self, fault: WireFault, *, after_bytes: int) -> None:
        """From the next handoff on the way to this host's lane has a fault, which strikes after so many bytes."""
        assert self._way is None
        scheme = self.flags["transport"]
        endpoint = next(lane.endpoint for lane in self.ref.lanes if lane.scheme == scheme)
        self._way = Hazard(endpoint, fault, after_bytes=after_bytes)
        self._way.__enter__()

    def mend(self) -> bool:
        """Cuts that way, whatever is on it. Whether its fault had struck."""
        way, self._way = self._way, None
        if way is None:
            return False
        way.__exit__()
        self._flipped_bits += way.has_struck and way.fault == "corrupt"
        return way.has_struck

    @property
    def pid(self) -> int:
        assert self.tool.alive  # one serves, so the file is of that one
        return int(json.loads((self._config.run_path / INFO_NAME).read_text())["pid"])

    def stats(self) -> dict[str, Any]:
        return self.tool.ask(Ask(verb="stats"), timeout_s=QUIET_S).body

    def kill(self) -> None:
        self._count()
        pid = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(pid, signal.SIGKILL)
        finally:
            os.close(pid)
        wait_until(lambda: self._tool is None or not self._tool.alive, QUIET_S, "the daemon is dead")

    def stop(self) -> None:
        self._stopped = self.pid
        os.kill(self._stopped, signal.SIGSTOP)

    def resume(self) -> None:
        if self._stopped:
            os.kill(self._stopped, signal.SIGCONT)
        self._stopped = 0

    def complaint(self) -> str:
        """Waits until nothing is under way. Says what is wrong then; empty: nothing."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not _busy(self.stats()), QUIET_S, "quiet")
        stats = self.stats()
        if _busy(stats):
            return f"daemon {self.name} is not quiet after {QUIET_S:g} s: {stats['store']} {stats['handoffs']}"
        if stats["counters"].get("commit_mismatches", 0) > self._flipped_bits:
            return f"daemon {self.name} has seen wrong checksums: {stats['counters']}"
        return self.tool.ask(Ask(verb="check"), timeout_s=QUIET_S).error

    def close(self) -> None:
        self.mend()
        if self._tool is not None:
            with contextlib.suppress(DaemonGone):
                self._count()
            self._tool.close()

    def _count(self) -> None:
        stats = self.stats()
        self.counters.update(stats["counters"], evicted_blocks=stats["store"]["evicted_blocks"])


def settings_of(flags: dict[str, str]) -> Config:
    return load(flags, environ={})


def _busy(stats: dict[str, Any]) -> bool:
    slots = stats["store"]["slots"]
    return bool(any(stats["store"]["leases"].values()) or stats["handoffs"] or slots["filling"] + slots["quarantine"])


def _run(pipe: Connection, name: str, role: Role, flags: dict[str, str], log: Path) -> None:
    """The engine's process."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    engine = PageEngine()
    peer = TorchPeer(engine, settings_of(flags), name, role)
    pipe.send_bytes(_encode(Ready()))
    generator = random.Random(name)
    with contextlib.suppress(EOFError):  # the soak is over
        while True:
            if pipe.poll(0 if engine.unfinished else IDLE_S):
                _take(peer, _decode(pipe.recv_bytes()))
            running = [request for request in engine.requests.values() if request.status == "running"]
            if running and generator.random() < PREEMPT:
                engine.preempt(generator.choice(running))
            engine.step()
            for request in engine.prune():
                if request.output:
                    pipe.send_bytes(_encode(Answered(int(request.request_id), request.output, engine.wrong)))


def _take(peer: TorchPeer, message: Any) -> None:
    name, engine = str(message.number), peer.engine
    if isinstance(message, GivenUp):
        request = engine.requests.get(name)
        if request is not None and request.status != "finished":
            engine.abort(request)
    elif not message.handle:
        engine.add(Request(name, message.tokens, max_tokens=message.max_tokens))
    elif message.sends:
        peer.send(name, message.tokens, message.handle)
    else:
        peer.load(name, message.tokens, message.handle, max_tokens=message.max_tokens)
