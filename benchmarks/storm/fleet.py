"""The processes of a storm: routers and hosts, to be killed, stopped, told to leave, and started again."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp

from benchmarks.harness.rig import REPOSITORY
from pdx.launch.ports import free_ports

DEADLINE_S = 30.0


class Part:
    """A process that publishes a file when it is there. Belongs to one event loop."""

    def __init__(self, name: str, command: list[str], publish: Path, log: Path) -> None:
        self.name = name
        self.ready = False
        self.lives = 0
        self._command, self._publish, self._log = command, publish, log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> str:
        """What it has published."""
        self._spawn()
        ends_at = time.monotonic() + DEADLINE_S
        while not self._publish.exists():
            if not self.alive or time.monotonic() > ends_at:
                raise RuntimeError(f"{self.name} did not start: see {self._log}")
            await asyncio.sleep(0.02)
        self.lives += 1
        self.ready = True
        return self._publish.read_text()

    def _spawn(self) -> None:
        self._publish.unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PDX_RUN_DIR": str(self._log.parent / "run")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment, cwd=REPOSITORY)

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        self.ready = False
        self.send(signal.SIGKILL)
        await self.ended()

    async def leave(self) -> None:
        self.ready = False
        self.send(signal.SIGTERM)
        await self.ended()

    async def ended(self) -> None:
        ends_at = time.monotonic() + DEADLINE_S
        while self.alive:
            if time.monotonic() > ends_at:
                self.send(signal.SIGKILL)
            await asyncio.sleep(0.02)

    def rss_mib(self) -> float:
        """Resident memory now; and its peak so far in `peak_mib`."""
        return _status(self.pid, "VmRSS") / 1024

    def peak_mib(self) -> float:
        return _status(self.pid, "VmHWM") / 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Router(Part):
    def __init__(self, scratch: Path, number: int, control: str, key_file: Path, *flags: str) -> None:
        publish = scratch / f"router{number}.json"
        command = [
            *(sys.executable, "-m", "pdx.router.main", "--port", "0", "--control", control),
            *("--key-file", str(key_file), "--publish", str(publish), "--log-level", "error", *flags),
        ]
        super().__init__(f"router{number}", command, publish, scratch / f"router{number}.log")
        self.url = ""

    async def start(self) -> str:
        self.url = json.loads(await super().start())["http"]
        return self.url


class Host(Part):
    def __init__(self, scratch: Path, name: str, controls: list[str], key_file: Path, *flags: str) -> None:
        publish = scratch / f"{name}.url"
        command = [
            *(sys.executable, "-m", "benchmarks.storm.host", "--name", name, "--controls", ",".join(controls)),
            *("--key-file", str(key_file), "--publish", str(publish), *flags),
        ]
        super().__init__(name, command, publish, scratch / f"{name}.log")
        self.page = ""

    async def start(self) -> str:
        self.page = await super().start()
        return self.page


class Fleet:
    """Routers and hosts over one cluster key."""

    def __init__(self, scratch: Path, *, routers: int, router_flags: list[str], hosts: dict[str, list[str]]) -> None:
        key_file = scratch / "cluster.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(secrets.token_bytes(32))
        controls = [f"tcp://127.0.0.1:{port}" for port in free_ports(routers)]
        self.routers = [Router(scratch, n, control, key_file, *router_flags) for n, control in enumerate(controls)]
        self.hosts = [Host(scratch, name, controls, key_file, *flags) for name, flags in hosts.items()]

    async def start(self, client: aiohttp.ClientSession) -> None:
        await asyncio.gather(*(part.start() for part in (*self.routers, *self.hosts)))
        await self.joined(client)

    async def joined(self, client: aiohttp.ClientSession) -> None:
        """Every router has every engine."""
        for router in self.routers:
            await until(client, f"{router.url}/readyz?engines={2 * len(self.hosts)}", lambda status, _: status == 200)

    async def pages(self, client: aiohttp.ClientSession) -> list[dict[str, object]]:
        found = []
        for host in self.hosts:
            async with client.get(host.page) as reply:
                found.append(await reply.json())
        return found

    async def in_flight(self, client: aiohttp.ClientSession) -> int:
        """Requests under way in all routers, by their own count."""
        total = 0.0
        for router in self.routers:
            async with client.get(router.url + "/metrics") as reply:
                lines = (await reply.text()).splitlines()
            shown = ("pdx_router_inflight ", "pdx_router_queued ")
            total += sum(float(line.split()[-1]) for line in lines if line.startswith(shown))
        return round(total)

    async def stop(self) -> None:
        await asyncio.gather(*(part.kill() for part in (*self.routers, *self.hosts)))


async def until(client: aiohttp.ClientSession, url: str, condition: object) -> None:
    """Asks until the answer is as it should be. Raises TimeoutError after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                async with client.get(url) as reply:
                    body = await reply.read()
                    if condition(reply.status, body):  # type: ignore[operator]
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


def _status(pid: int, name: str) -> int:
    """KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
