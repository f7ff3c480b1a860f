"""What chaos breaks: a router, and two prefill and two decode engines on two hosts, all of them real.

The hosts are network namespaces. P0 and D1 live on host a, P1 and D0 on host b, so that handoffs go both ways and
within a host; KV and daemons' messages travel on the wire, requests and announcements on each host's way to the router.
Daemons are started by the engines themselves. Owned by the thread that breaks and heals.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.chaos.plan import DAEMONS, ENGINES, ROLES, ROUTER, WIRE, Piece
from benchmarks.chaos.traffic import ROUTER_LIMIT_S
from benchmarks.harness.netns import Host, Wire
from benchmarks.harness.part import Part
from benchmarks.harness.rig import Rig, get, tail
from pdx import config
from pdx.launch import processes

PLACES = {"P0": ("prefill", "a"), "D1": ("decode", "a"), "P1": ("prefill", "b"), "D0": ("decode", "b")}
CPU = {"a": 0, "b": 1}
CHUNK = ("--max-num-batched-tokens", "256")
# An arena of 85 blocks: with six requests of up to six blocks each, cache is evicted and claims sometimes wait.
DAEMON: dict[str, Any] = {"arena": "256MiB", "poison": "true", "digest_mode": "true", "lease_s": "4", "linger_s": "600"}
ROUTER_FLAGS = ("--request-timeout-secs", str(ROUTER_LIMIT_S), "--prefill-timeout-secs", "20")
TITLES = {"core": "VLLM::EngineCor", "worker": "VLLM::Worker"}  # as /proc/PID/comm cuts them off
PROBE_S = 2.0


class Fleet:
    """Parts by name; `unwell` are those that are dead, starting, stopped or cut."""

    def __init__(self, rig: Rig, wire: Wire, *, find: Callable[[str], None]) -> None:
        self.rig = rig
        self.engines: dict[str, Part] = {}
        self.router: Part | None = None
        self._find = find
        self._wire = wire
        self._hosts = {"a": wire.source, "b": wire.target}
        self._router_kills: list[float] = []
        self._dead: set[str] = set()
        self._starting: set[str] = set()
        self._stopped: dict[str, list[int]] = {}  # victim -> pidfds of what was stopped
        self._cut: set[str] = set()
        self._shared: dict[str, set[Path]] = {}  # what a victim mapped while it lived
        self.starts: Counter[str] = Counter()

    def start(self) -> None:
        """The router, then the engines; nobody waits for them here: see `unwell`."""
        self._start_router()
        for name in ENGINES:
            self._start_engine(name)

    @property
    def unwell(self) -> frozenset[str]:
        names = self._dead | self._starting | self._stopped.keys() | self._cut
        return frozenset(names | {name for name in DAEMONS if not self._daemon_pid(name)})

    def router_url(self) -> str:
        return self.rig.url

    def router_died_since(self, moment: float) -> bool:
        return ROUTER in self._dead or any(killed >= moment for killed in self._router_kills)

    # --- breaking -----------------------------------------------------------------------------------------------

    def kill(self, target: str, piece: Piece = "all") -> None:
        """kill -9. `revive` must follow."""
        if target in ROLES:
            for name in ENGINES:
                if PLACES[name][0] == target:
                    self.kill(name)
        elif target in DAEMONS:
            self.rig.kill_daemon(target[-1])  # its engines start the next one
        elif target == ROUTER:
            assert self.router is not None
            self._dead.add(ROUTER)
            self._router_kills.append(time.monotonic())
            self.router.kill()
            self.rig.forget(self.router)
        else:
            part = self.engines[target]
            self._dead.add(target)
            self._shared[target] = processes.shared_memory_of(part.pids)
            processes.kill(self._pids(target, piece))

    def revive(self, target: str) -> None:
        if target in ROLES:
            for name in ENGINES:
                if PLACES[name][0] == target:
                    self.revive(name)
        elif target == ROUTER:
            self._start_router()
            self._dead.discard(ROUTER)
        elif target in ENGINES:
            self._bury(target)
            self._start_engine(target)

    def stop(self, target: str, piece: Piece = "all") -> None:
        """SIGSTOP. `resume` must follow."""
        self._stopped[target] = []
        for pid in self._pids(target, piece):
            with contextlib.suppress(ProcessLookupError):
                self._stopped[target].append(os.pidfd_open(pid))
                os.kill(pid, signal.SIGSTOP)

    def resume(self, target: str) -> None:
        for pidfd in self._stopped.pop(target, []):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)

    def cut(self, target: str, way: int) -> str:
        """Nothing passes a link any more, or nothing in one direction. `mend` must follow. Says how it was cut."""
        self._cut.add(target)
        ends = self._ends(target)
        if way == 0:
            _ip(*ends[0], "down")
            return "down"
        silent = ends if way == 1 else [ends[way % len(ends)]]
        for host, device in silent:
            # A queue that holds nothing: packets vanish, and nobody is told.
            _tc(host, device, "replace", "pfifo", "limit", "0")
        return "silent" if len(silent) > 1 else "silent one way"

    def mend(self, target: str) -> None:
        for host, device in self._ends(target):
            with contextlib.suppress(subprocess.CalledProcessError):  # it drops nothing
                _tc(host, device, "del")
            _ip(host, device, "up")
        self._cut.discard(target)

    def let_go(self) -> None:
        """Nothing stays stopped or cut, whatever has happened."""
        for target in list(self._stopped):
            self.resume(target)
        for target in list(self._cut):
            self.mend(target)

    # --- looking ------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Which engines serve by now; who ended by itself is told and started again."""
        routable = self._routable() if self._starting else set()
        for name, part in list(self.engines.items()):
            if name in self._dead:
                continue
            if part.process.poll() is not None:
                self._find(
                    f"{name} ended by itself with {part.process.returncode}, see {part.log}:\n{tail(part.log, 8)}"
                )
                self._bury(name)
                self._start_engine(name)
            elif name in self._starting and name in routable and get(f"{part.url}/health") == 200:
                self._starting.discard(name)
        if self.router is not None and ROUTER not in self._dead and self.router.process.poll() is not None:
            self._find(f"the router ended by itself, see {self.router.log}:\n{tail(self.router.log, 8)}")
            self.rig.forget(self.router)
            self._start_router()

    def stray_shared_memory(self, before: set[Path]) -> list[str]:
        """Files that came to /dev/shm since, and that no living process maps."""
        new = set(processes.SHARED_MEMORY.iterdir()) - before
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return sorted(path.name for path in new - processes.shared_memory_of(pids) if path.exists())

    # --- steps --------------------------------------------------------------------------------------------------

    def _start_router(self) -> None:
        self.router = self.rig.start_router(*ROUTER_FLAGS, host=self._wire.outside)

    def _start_engine(self, name: str) -> None:
        role, daemon = PLACES[name]
        host = self._hosts[daemon]
        self.engines[name] = self.rig.start_engine(
            name, role, daemon, cpu=CPU[daemon], flags=CHUNK, host=host.management, prefix=host.prefix,
            environment={"PDX_HOST": host.wire}, **DAEMON,
        )  # fmt: skip
        self._starting.add(name)
        self._dead.discard(name)
        self.starts[name] += 1

    def _bury(self, name: str) -> None:
        """What is left of an engine, other processes and shared memory."""
        part = self.engines[name]
        part.kill()
        self.rig.forget(part)
        processes.unlink_unused(self._shared.pop(name, set()))

    def _pids(self, target: str, piece: Piece) -> list[int]:
        if target in DAEMONS:
            return [pid] if (pid := self._daemon_pid(target)) else []
        if target == ROUTER:
            assert self.router is not None
            return self.router.pids
        part = self.engines[target]
        if piece == "api":
            return [part.process.pid]
        return [pid for pid in part.pids if piece == "all" or _title(pid) == TITLES[piece]]

    def _daemon_pid(self, target: str) -> int:
        """0: there is none now."""
        try:
            pid = int(json.loads((self.rig.settings_of(target[-1]).run_path / config.INFO_NAME).read_text())["pid"])
            os.kill(pid, 0)
        except (OSError, ValueError):
            return 0
        return pid

    def _ends(self, target: str) -> list[tuple[Host, str]]:
        if target == WIRE:
            return [(host, "wire") for host in self._hosts.values()]
        return [(self._hosts[target[-1]], "manage")]

    def _routable(self) -> set[str]:
        """The engines that the router would choose now."""
        target = urlsplit(self.rig.url)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=PROBE_S)
        try:
            connection.request("GET", "/readyz")
            return {engine["engine_id"] for engine in json.loads(connection.getresponse().read())["engines"]}
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return set()
        finally:
            connection.close()


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it ended
        return ""


def _ip(host: Host, device: str, state: str) -> None:
    _run("ip", "-n", host.name, "link", "set", device, state)


def _tc(host: Host, device: str, verb: str, *what: str) -> None:
    _run("tc", "-n", host.name, "qdisc", verb, "dev", device, "root", *what)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)
