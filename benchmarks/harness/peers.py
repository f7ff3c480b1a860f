"""Peers' arms: vLLM's own NixlConnector pair behind the usual prefill-first proxy, or behind vllm-router.

Pinned as a pdx pair is: P on core 0; D and the front on core 1. Only NIXL's progress threads, which poll all the time
and would take half of their own engine's core, may use either core, at the lowest priority. While requests come one by
one one of the two cores is nearly free for them. Beside a stream, or with two requests at once, both are busy: then
these threads wait for a core, which may cost NIXL time that it would not lose on a machine with more. `lanes` are
UCX's transports: by default everything that works between two processes of one host; "tcp" is the network that a pdx
pair of two daemons uses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.arms import DECODE_CPUS, PREFILL_CPUS, Arm, Scratch, serving, start_plain, wait_engines
from benchmarks.harness.part import Part
from benchmarks.harness.relay import Relay
from benchmarks.harness.rig import Rig, get, wait_until
from pdx.errors import PdxError
from pdx.launch.ports import free_ports

ALL_LANES = "tcp,cma,sysv,posix,self"
TCP = "tcp"
FRONT_S = 60.0
LOOK_S, BUSY_PART = 2.0, 0.08  # an idle engine's other threads take some 1 % of a core
LAST = 19  # the lowest priority: some 1.5 % of a core that others want


def nixl_pair(scratch: Scratch, name: str, front: str = "proxy", **more: Any) -> Arm:
    """Two engines with NixlConnector. `front`: "proxy" or "vllm-router". `more`: see nixl_pairs."""
    return nixl_pairs(scratch, name, (front,), **more)[0]


def nixl_pairs(
    scratch: Scratch,
    name: str,
    fronts: Sequence[str] = ("proxy", "vllm-router"),
    *,
    lanes: str = ALL_LANES,
    flags: tuple[str, ...] = (),
    relay: Relay | None = None,
) -> list[Arm]:
    """An arm for each front, all with the same two engines. `relay` is put before the prefill engine."""
    if importlib.util.find_spec("nixl") is None:
        raise PdxError("the NixlConnector pair needs nixl: pip install 'pdx-kv[bench]'")
    rig = scratch.rig(name)
    prefill = start_nixl(rig, "P", PREFILL_CPUS, lanes=lanes, flags=flags)
    decode = start_nixl(rig, "D", DECODE_CPUS, lanes=lanes, flags=flags)
    wait_engines([prefill, decode])
    prefill_url = prefill.url
    if relay is not None:
        relay.target, prefill_url = prefill.url, relay.url
    arms = []
    for front in fronts:
        part = start_front(rig, front, prefill_url, decode.url)
        called = name if len(fronts) == 1 else f"{name}-{front}"
        arms.append(Arm(scratch, called, part.url, [prefill, decode, part], ready=serving(part)))
    calm_progress_threads([prefill, decode])
    for arm in arms:
        arm.pause()
    return arms


def calm_progress_threads(engines: Sequence[Part]) -> None:
    """Lets those threads of idle engines that are busy all the same run on any core, behind everything else.

    NIXL polls without a pause. Pinned beside the model's thread it would halve the engine's speed, which says more of
    a machine with two cores than of NIXL. Call once the engines are pinned.
    """
    before = [engine.thread_ticks() for engine in engines]
    time.sleep(LOOK_S)
    for engine, ticks in zip(engines, before, strict=True):
        for thread, now in engine.thread_ticks().items():
            if (
                thread not in engine.pids
                and now - ticks.get(thread, 0) >= LOOK_S * os.sysconf("SC_CLK_TCK") * BUSY_PART
            ):
                os.sched_setaffinity(thread, range(os.cpu_count() or 1))
                os.setpriority(os.PRIO_PROCESS, thread, LAST)


def start_nixl(
    rig: Rig,
    name: str,
    cpus: str,
    *,
    lanes: str = ALL_LANES,
    flags: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    prefix: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Part:
    """One engine with NixlConnector, its KV cache in host memory; `wait_engines` waits for it."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    surroundings = {
        "UCX_TLS": lanes,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_ports(1)[0]),
        **(environment or {}),
    }
    return start_plain(
        rig, name, cpus, ("--kv-transfer-config", json.dumps(transfer), *flags),
        environment=surroundings, host=host, prefix=prefix,
    )  # fmt: skip


def start_front(
    rig: Rig, front: str, prefill: str, decode: str, *, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()
) -> Part:
    """The proxy or vllm-router, in front of these two engines, serving."""
    port, metrics_port = free_ports(2)
    where = ("--host", host, "--port", str(port))
    if front == "proxy":
        command = [
            sys.executable,
            "-m",
            "benchmarks.harness.prefill_first",
            *where,
            "--prefill",
            prefill,
            "--decode",
            decode,
        ]
    else:
        command = [
            *(vllm_router(), "--vllm-pd-disaggregation", *where, "--policy", "round_robin"),
            *("--prefill", prefill, "--decode", decode, "--prometheus-port", str(metrics_port)),
        ]
    part = rig.start_program(front, command, cpus=DECODE_CPUS, prefix=prefix)
    part.url = f"http://{host}:{port}"
    wait_until(lambda: get(f"{part.url}/health") == 200, FRONT_S, f"{front} serves; see {part.log}")
    return part


def vllm_router() -> str:
    beside_python = Path(sys.executable).with_name("vllm-router")
    found = str(beside_python) if beside_python.exists() else shutil.which("vllm-router")
    if not found:
        raise PdxError("vllm-router is missing: pip install 'pdx-kv[bench]'")
    return found
