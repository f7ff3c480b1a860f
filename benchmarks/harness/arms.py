"""Arms: what a benchmark compares, each a set of pinned programs behind one URL, stopped (SIGSTOP) while another runs.

Owns how plain engines and pdx pairs are put together and pinned; peers' arms are in `peers`. Knows nothing of load.

On two cores the map is: the prefill engine on core 0; the decode engine, both pdxd, the router and the client on core
1. Hosts have cores beside those that compute, and here prefill's computes without a pause. `Part.pin` moves every
thread there: vLLM binds only its OMP threads, and a pair whose other threads float runs at half speed, which must not
be sold as anybody's gain.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.harness.leaving import leaving
from benchmarks.harness.measure import completion, prompt_of, stream
from benchmarks.harness.part import Part
from benchmarks.harness.relay import Relay
from benchmarks.harness.rig import START_S, Rig, get, tail, wait_until
from benchmarks.model import dtype_flags
from pdx.client import DaemonClient
from pdx.errors import PdxError
from pdx.launch.ports import free_ports

# The kernel may have taken away what a stopped arm did not use: a probe of several steps brings it back.
PROBE_TOKENS = 513
WARM_S = 120.0
RESUME_S = 120.0  # pages that the kernel took away meanwhile come back; and routers hear of their engines again
PREFILL_CPUS, DECODE_CPUS = "0", "1"
# 11,600 tokens of the demo model: the longest prompt here, three times, and other streams beside it.
KV_CACHE_BYTES = 256 << 20
KV_CACHE = ("--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
ENGINE_FLAGS = ("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16", *KV_CACHE)
# The naive ways push nothing for as long as a prompt is computed.
BUDGETS = ("--handoff-grant-s", "30", "--handoff-slab-s", "60", "--handoff-total-s", "120", "--handoff-claim-s", "30")
# Engines that start beside others may take minutes; a daemon that lingers out meanwhile ends the benchmark.
DAEMON_SETTINGS = {"arena": "512MiB", "linger_s": "600"}


class Scratch:
    """A folder, a model and every arm started with them. Leaving the context stops all arms, whatever happened.

    SIGTERM and SIGHUP leave it too.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self.folder = Path(tempfile.mkdtemp(prefix="pdx-bench-"))
        self.arms: list[Arm] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(leaving())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"{error!r}; logs are kept in {self.folder}", flush=True)
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def rig(self, name: str) -> Rig:
        """A rig of its own folder; it ends with us at the latest."""
        folder = self.folder / name
        folder.mkdir()
        return self._stack.enter_context(Rig(self.model, folder))


class Arm:
    """One thing to measure. Built running, then paused; only `active` lets it run."""

    _served_by = "content-type"  # a header that only an answer has which was served as it should be

    def __init__(
        self, scratch: Scratch, name: str, url: str, parts: list[Part], *, ready: Callable[[], object]
    ) -> None:
        self.name = name
        self.url = url
        self.model = scratch.model
        self.parts = parts
        self._ready = ready
        scratch.arms.append(self)
        for part in parts:
            part.pin()

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def pause(self) -> None:
        for part in self.parts:
            part.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Returns when the arm serves again: routers and daemons that slept have to hear of each other first."""
        for part in self.parts:
            part.signal(signal.SIGCONT)
        wait_until(lambda: self._ready() and self.probe(), RESUME_S, f"{self.name} serves again")

    def probe(self) -> bool:
        """Whether a short request is served, as this arm serves requests. It also opens connections that had closed."""
        prompt = prompt_of(PROBE_TOKENS, time.monotonic_ns())
        timing = stream(self.url, completion(self.model, prompt, 3), RESUME_S)
        return timing.good and self._served_by in timing.headers

    def warm(self, sizes: Sequence[int]) -> None:
        """Each size once: kernels are chosen by shape at first use. The memory is touched when engines start."""
        for size in sizes:
            timing = stream(self.url, completion(self.model, prompt_of(size, -1), 3), WARM_S)
            if not timing.good:
                raise PdxError(f"{self.name} answered {timing.status} to {size} tokens: {timing.error}")

    @contextlib.contextmanager
    def active(self) -> Iterator[Self]:
        self.resume()
        try:
            yield self
        finally:
            self.pause()

    def cpu_seconds(self) -> dict[str, float]:
        return {part.name: round(part.cpu_seconds(), 2) for part in self.parts}

    def taskset(self) -> dict[str, str]:
        return {part.name: part.cores() for part in self.parts}

    def stop(self) -> None:
        for part in reversed(self.parts):
            part.stop()


class PdxPair(Arm):
    """A prefill engine P and a decode engine D, their daemons and a router whose flags can be changed."""

    _served_by = "x-pdx-prefill"

    def __init__(self, scratch: Scratch, name: str, rig: Rig, daemons: tuple[str, str], flags: tuple[str, ...]) -> None:
        self.rig = rig
        self._flags = flags
        super().__init__(scratch, name, rig.url, rig.parts, ready=lambda: get(f"{self.url}/readyz?engines=2") == 200)
        self.prefill, self.decode = self.part("P"), self.part("D")
        self.daemons = daemons
        self._tools: tuple[DaemonClient, DaemonClient] | None = None

    @property
    def run_dir(self) -> Path:
        """Of prefill's daemon."""
        return self.run_dirs[0]

    @property
    def run_dirs(self) -> list[Path]:
        """Of both daemons."""
        return [self.rig.settings_of(daemon).run_path for daemon in self.daemons]

    def tools(self) -> tuple[DaemonClient, DaemonClient]:
        """Clients of prefill's and of decode's daemon. Ask only while the arm is active."""
        if self._tools is None:
            self._tools = (self.rig.tool(self.daemons[0]), self.rig.tool(self.daemons[1]))
        return self._tools

    def route(self, *flags: str) -> None:
        """Restarts the router at the same address if it does not have these flags yet. The arm must be active."""
        if flags == self._flags:
            return
        old = self.part("router")
        old.stop()
        self.rig.forget(old)
        new = self.rig.start_router(*BUDGETS, *flags, cpus=old.cpus)
        new.pin()
        self._flags = flags
        wait_until(lambda: self._ready() and self.probe(), RESUME_S, "both engines are routable")


def plain(scratch: Scratch, name: str, cpus: str = PREFILL_CPUS, flags: Sequence[str] = ()) -> Arm:
    """One vLLM engine without a connector."""
    return plain_engines(scratch, name, {"engine": cpus}, flags)[0]


def two_plain(
    scratch: Scratch, name: str, cpus: Sequence[str] = (PREFILL_CPUS, DECODE_CPUS), flags: Sequence[str] = ()
) -> tuple[Arm, Arm]:
    """Two engines that know nothing of each other; the client alternates between them."""
    first, second = plain_engines(scratch, name, {"engine0": cpus[0], "engine1": cpus[1]}, flags)
    return first, second


def plain_engines(
    scratch: Scratch,
    name: str,
    engines: Mapping[str, str],
    flags: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> list[Arm]:
    """Engines without a connector, started at once: {part name: cores}. An arm for each."""
    rig = scratch.rig(name)
    parts = [start_plain(rig, part, cpus, flags, environment=environment) for part, cpus in engines.items()]
    wait_engines(parts)
    arms = []
    for part in parts:
        called = name if len(parts) == 1 else f"{name}-{part.name}"
        arms.append(Arm(scratch, called, part.url, [part], ready=serving(part)))
    for arm in arms:
        arm.pause()
    return arms


def pdx_pair(
    scratch: Scratch,
    name: str,
    *,
    daemons: tuple[str, str] = ("a", "b"),
    router_flags: tuple[str, ...] = (),
    engine_flags: tuple[str, ...] = (),
    prefill_flags: tuple[str, ...] = (),
    daemon_settings: Mapping[str, str] | None = None,
    daemon_module: str = "pdx.daemon.main",
    relay: Relay | None = None,
    environment: Mapping[str, str] | None = None,
) -> PdxPair:
    """P and D behind a router. One daemon name twice: both engines on "one host", no network between them.

    `daemon_module`: see Rig.start_daemon. `relay` is put before P: the router is told its address instead of P's.
    """
    rig = scratch.rig(name)
    rig.start_router(*BUDGETS, *router_flags, cpus=DECODE_CPUS)
    for daemon in dict.fromkeys(daemons):
        settings = {**DAEMON_SETTINGS, **(daemon_settings or {})}
        rig.start_daemon(daemon, cpus=DECODE_CPUS, prefix=(), module=daemon_module, **settings)
    common = (*ENGINE_FLAGS, *engine_flags)
    behind = relay.url if relay else ""
    prefill = rig.start_engine(
        "P", "prefill", daemons[0], cpu=PREFILL_CPUS, flags=(*common, *prefill_flags), behind=behind,
        environment=environment,
    )  # fmt: skip
    if relay:
        relay.target = prefill.url
    rig.start_engine("D", "decode", daemons[1], cpu=DECODE_CPUS, flags=common, environment=environment)
    rig.wait_routable(2)
    pair = PdxPair(scratch, name, rig, daemons, router_flags)
    pair.pause()
    return pair


def start_plain(
    rig: Rig,
    name: str,
    cpus: str,
    flags: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
    host: str = "127.0.0.1",
) -> Part:
    """Starts vLLM as it is, with our flags of size and with `flags`; `wait_engines` waits for it."""
    port = free_ports(1)[0]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(rig.model)),
        *("--host", host, "--port", str(port), *ENGINE_FLAGS, *dtype_flags(), *flags),
    ]
    surroundings = {"VLLM_CPU_OMP_THREADS_BIND": cpus, "VLLM_HOST_IP": host, **(environment or {})}
    part = rig.start_program(name, command, environment=surroundings, cpus=cpus, prefix=prefix)
    part.url = f"http://{host}:{port}"
    return part


def wait_engines(parts: Sequence[Part]) -> None:
    """Until all of them serve. Raises SystemExit with the log of one that ended."""

    def ready() -> bool:
        for part in parts:
            if part.process.poll() is not None:
                raise SystemExit(f"{part.name} ended by itself, see {part.log}:\n{tail(part.log)}")
        return all(get(f"{part.url}/health") == 200 for part in parts)

    wait_until(ready, START_S, f"{', '.join(part.name for part in parts)} serve")


def serving(part: Part) -> Callable[[], bool]:
    return lambda: get(f"{part.url}/health") == 200
