"""Real routers, daemons and vLLM engines for proofs and benchmarks, each to be started, stopped and killed alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.harness.leaving import leaving
from benchmarks.harness.part import Part
from benchmarks.model import dtype_flags
from pdx import config
from pdx.client import DaemonClient
from pdx.launch import engine as engines
from pdx.launch import processes
from pdx.launch.ports import free_ports
from pdx.wire import Ask, Attach

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KV_CACHE_BYTES = 512 << 20
# These bound hangs. Where other jobs take the cores, all of this takes five times as long, or ten.
START_S = 600.0
ANSWER_S = 30.0
# Of tests: these only bound hangs, however slow the machine is.
PATIENT_S = 500.0
PATIENT = tuple(
    word
    for flag in ("--prefill-timeout-secs", *(f"--handoff-{name}-s" for name in ("grant", "slab", "total", "claim")))
    for word in (flag, str(PATIENT_S))
)
BUDGET_FLAGS = ("--handoff-grant-s", "5", "--handoff-slab-s", "6", "--handoff-total-s", "60", "--handoff-claim-s", "2")


@dataclass(frozen=True)
class Reply:
    """What a client got. `status` 0: the connection broke."""

    status: int
    text: str
    seconds: float
    first_token_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    logprobs: dict[str, Any] = field(default_factory=dict)  # if they were asked for


class Rig:
    """Everything that one proof starts. Leaving the context ends all of it; SIGTERM and SIGHUP leave it."""

    def __init__(self, model: Path, scratch: Path) -> None:
        self.model = model
        self._scratch = scratch
        self._key = scratch / "cluster.key"
        self._key.touch(mode=0o600)
        self._key.write_bytes(secrets.token_bytes(32))
        self.parts: list[Part] = []
        self._tools: list[DaemonClient] = []
        self._started = 0
        self.url = self.control = ""
        self._leaving = contextlib.ExitStack()

    def __enter__(self) -> Rig:
        self._leaving.enter_context(leaving())
        return self

    def __exit__(self, *_: object) -> None:
        with self._leaving:
            self._end()

    def _end(self) -> None:
        for tool in self._tools:
            tool.close()
        for part in reversed(self.parts):
            part.stop()
        for pid in self._strays():  # engines that lost their daemon have started another, detached
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not self._strays(), ANSWER_S, "daemons that engines started are gone")

    def _strays(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"--run-dir={self._scratch}" in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
        return found

    # --- starting ---

    # `prefix` goes before a command, e.g. ("ip", "netns", "exec", NAME), and must end in an exec of it.

    def start_router(self, *flags: str, host: str = "127.0.0.1", cpus: str = "", prefix: tuple[str, ...] = ()) -> Part:
        self._started += 1
        published = self._scratch / f"router-{self._started}.json"
        port = urlsplit(self.url).port or 0
        control = self.control or f"tcp://{host}:0"
        command = [
            *(sys.executable, "-m", "pdx.router.main", "--host", host, "--port", str(port), "--control", control),
            # In turns: what is measured here are pairs, also where one engine alone would be sooner.
            *("--publish", str(published), "--key-file", str(self._key), "--policy", "round_robin", *BUDGET_FLAGS),
            *flags,
        ]
        part = self._start("router", command, {}, cpus=cpus, prefix=prefix)
        wait_until(published.exists, START_S, f"router listens; see {part.log}")
        where = json.loads(published.read_text())
        part.url = self.url = where["http"]
        self.control = where["control"]
        return part

    def start_daemon(
        self,
        name: str,
        *,
        cpus: str = "",
        prefix: tuple[str, ...] = (),
        module: str = "pdx.daemon.main",
        **settings: str,
    ) -> Part:
        """`module`: another program with pdxd's flags, for naive variants."""
        run_dir = self._scratch / name
        (run_dir / config.INFO_NAME).unlink(missing_ok=True)  # of one that was killed
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        part = self._start(
            f"pdxd-{name}",
            [sys.executable, "-m", module, f"--run-dir={run_dir}", f"--key-file={self._key}", *flags],
            {}, cpus=cpus, prefix=prefix,
        )  # fmt: skip
        wait_until((run_dir / config.INFO_NAME).exists, START_S, f"pdxd serves; see {part.log}")
        return part

    def start_engine(
        self,
        name: str,
        role: str,
        daemon: str,
        *,
        cpu: int | str,
        flags: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        prefix: tuple[str, ...] = (),
        behind: str = "",
        connector: str = "",
        **settings: str,
    ) -> Part:
        """Starts one; `wait_routable` waits for it. `settings` are for a daemon that it may have to start.

        `behind`: the URL that it announces instead of its own, of something that passes all on to it.
        `connector`: another module with a PdxConnector, for naive variants.
        """
        spec = engines.EngineSpec(
            name=name,
            role=role,
            model=str(self.model),
            port=free_ports(1)[0],
            host=host,
            cpus=str(cpu),
            settings={
                **settings,
                "run_dir": str(self._scratch / daemon),
                "router": self.control,
                "key_file": str(self._key),
            },
            flags=(
                *("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16"),
                *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES), *dtype_flags(), *flags),
            ),
        )
        command = _altered(engines.command(spec), url=behind, module=connector)
        surroundings = engines.environment(spec) | dict(environment or {})
        part = self._start(name, command, surroundings, cpus=str(cpu), prefix=prefix)
        part.url = spec.url
        return part

    def start_program(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cpus: str = "",
        prefix: tuple[str, ...] = (),
    ) -> Part:
        """Anything else that must stop with the rest: peers' engines, proxies and routers."""
        return self._start(name, list(command), dict(environment or {}), cpus=cpus, prefix=prefix)

    def kill_daemon(self, name: str) -> None:
        """kill -9, whoever started it."""
        info = self._scratch / name / config.INFO_NAME
        pid = json.loads(info.read_text())["pid"]
        info.unlink()
        processes.kill([pid])

    def wait_routable(self, count: int) -> None:
        def ready() -> bool:
            for part in self.parts:
                if part.process.poll() is not None:
                    raise SystemExit(f"{part.name} ended by itself, see {part.log}:\n{tail(part.log)}")
            return get(f"{self.url}/readyz?engines={count}") == 200

        wait_until(ready, START_S, f"{count} engines are routable")

    def forget(self, part: Part) -> None:
        """It was killed on purpose."""
        self.parts.remove(part)

    def tool(self, daemon: str) -> DaemonClient:
        tool = DaemonClient.attach(self.settings_of(daemon), Attach(kind="tool"), start=False, deadline_s=ANSWER_S)
        self._tools.append(tool)
        return tool

    def settings_of(self, daemon: str) -> config.Config:
        return config.load({"run_dir": str(self._scratch / daemon)}, environ={})

    def _start(
        self, name: str, command: list[str], environment: dict[str, str], *, cpus: str, prefix: tuple[str, ...]
    ) -> Part:
        self._started += 1
        log = self._scratch / f"{name}-{self._started}.log"
        pinned = [*prefix, *(("taskset", "-c", cpus) if cpus else ()), *command]
        with log.open("wb") as out:
            process = subprocess.Popen(
                pinned, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **engines.import_path(), **environment}, cwd=REPOSITORY,
            )  # fmt: skip
        part = Part(name, process, log, cpus=cpus)
        self.parts.append(part)
        return part

    # --- asking ---

    def complete(
        self, prompt: str | list[int], *, url: str = "", max_tokens: int = 8, deadline_s: float = 120.0, **more: Any
    ) -> Reply:
        """One greedy completion, not streamed."""
        body = {"model": str(self.model), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
        return post(f"{url or self.url}/v1/completions", body, deadline_s=deadline_s)

    def together(self, calls: Sequence[Callable[[], Reply]]) -> list[Reply]:
        """All at once, each in a thread."""
        replies: list[Reply | None] = [None] * len(calls)

        def run(number: int) -> None:
            replies[number] = calls[number]()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [reply for reply in replies if reply is not None]


def stats(tool: DaemonClient) -> dict[str, Any]:
    return tool.ask(Ask(verb="stats"), timeout_s=ANSWER_S).body


def counter(tool: DaemonClient, name: str) -> int:
    return int(stats(tool)["counters"].get(name, 0))


def leases(tool: DaemonClient) -> int:
    return sum(stats(tool)["store"]["leases"].values())


def quiet(tool: DaemonClient) -> bool:
    """No lease, no slot that is being filled or in quarantine, no half of a handoff."""
    now = stats(tool)
    leases_left, slots = now["store"]["leases"].values(), now["store"]["slots"]
    return not (any(leases_left) or slots["filling"] or slots["quarantine"] or now["handoffs"])


def unleased(*tools: DaemonClient, deadline_s: float = 10.0) -> bool:
    """Everything of these daemons is quiet within the deadline, and their books agree."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: all(quiet(tool) for tool in tools), deadline_s, "all leases end")
    return all(quiet(tool) for tool in tools) and not any(tool.ask(Ask(verb="check")).error for tool in tools)


def post(url: str, body: dict[str, Any] | bytes, *, deadline_s: float) -> Reply:
    """One request with a deadline; never raises for what the network or the server does."""
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=deadline_s)
    started = time.monotonic()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        path = f"{target.path}?{target.query}" if target.query else target.path
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        headers = {key.lower(): value for key, value in response.getheaders()}
        answer = json.loads(content) if headers.get("content-type", "").startswith("application/json") else {}
        choice = (answer.get("choices") or [{}])[0]
        text = choice.get("text", (choice.get("message") or {}).get("content")) or str(answer.get("error", ""))
        usage, logprobs = answer.get("usage") or {}, choice.get("logprobs") or {}
        return Reply(response.status, text, time.monotonic() - started, 0.0, headers, usage, logprobs)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Reply(0, repr(error), time.monotonic() - started)
    finally:
        connection.close()


def post_stream(url: str, body: dict[str, Any], *, deadline_s: float) -> tuple[Reply, list[str]]:
    """One streamed answer: what it says, and the data of its server-sent events. Raises OSError, HTTPException."""
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=deadline_s)
    started = time.monotonic()
    try:
        connection.request("POST", target.path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        headers = {key.lower(): value for key, value in response.getheaders()}
        events, pieces, first_token_s = [], [], 0.0
        while line := response.readline():
            if line.startswith(b"data: "):
                events.append(line[6:].decode().strip())
                pieces.append(_piece(events[-1]))
                if pieces[-1] and not first_token_s:
                    first_token_s = time.monotonic() - started
        return Reply(response.status, "".join(pieces), time.monotonic() - started, first_token_s, headers), events
    finally:
        connection.close()


def _piece(event: str) -> str:
    choices = json.loads(event).get("choices") if event.startswith("{") else None
    return (choices[0].get("text") or choices[0].get("delta", {}).get("content") or "") if choices else ""


def get(url: str) -> int:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=5)
    try:
        connection.request("GET", f"{target.path}?{target.query}")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _altered(command: list[str], *, url: str, module: str) -> list[str]:
    """The engine's command with another URL for the router, or another connector, where there is one."""
    index = command.index(engines.OUR_FLAG) + 1
    transfer = json.loads(command[index])
    if url:
        transfer["kv_connector_extra_config"]["url"] = url
    if module:
        transfer["kv_connector_module_path"] = module
    return [*command[:index], json.dumps(transfer, separators=(",", ":")), *command[index + 1 :]]


def wait_until(condition: Callable[[], object], deadline_s: float, what: str) -> None:
    """Looks every 20 ms. Raises TimeoutError."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.02)


def tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def rig_in(model: Path, scratch: Path) -> Iterator[Rig]:
    scratch.mkdir(parents=True, exist_ok=True)
    with Rig(model, scratch) as rig:
        yield rig
