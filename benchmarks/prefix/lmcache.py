"""The peer: vLLM with LMCache's multi-process connector, its server on the other core.

Three transports can be chosen, since which one is best here is to be measured, not believed: the engine copies into
shared memory (`engine-shm`), sends its pages as messages (`engine-pickle`), or hands its cache to the server, which
copies (`server`). LMCache is not installed with pdx: its dependencies contradict vLLM's, so it goes, without them, into
a folder of its own at first use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.arms import DECODE_CPUS, PREFILL_CPUS, Scratch, serving, start_plain, wait_engines
from benchmarks.harness.counters import scraped
from benchmarks.harness.rig import get, tail, wait_until
from benchmarks.prefix.engines import ENVIRONMENT, CachingArm
from pdx.errors import PdxError
from pdx.launch.engine import import_path
from pdx.launch.ports import free_ports

VERSION = "0.5.6"
PACKAGES = (
    f"lmcache=={VERSION}", "sortedcontainers", "aiofile", "caio", "aiofiles", "redis",
    "opentelemetry-exporter-prometheus==0.61b0",
)  # fmt: skip
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "peers" / f"lmcache-{VERSION}"
# It would tell its makers' server of every start.
QUIET = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
TRANSPORTS = {
    "engine-shm": ("engine_driven", ("--shm-name", "pdx-bench-peer", "--no-l1-use-lazy")),
    "engine-pickle": ("engine_driven", ("--shm-name", "")),
    "server": ("lmcache_driven", ("--no-l1-use-lazy",)),
}
START_S, INSTALL_S = 120.0, 300.0
READ = "lmcache_mp_l1_read_chunks_total"


class LmcacheArm(CachingArm):
    """Its hit counters are the server's: in chunks, as large here as vLLM's blocks."""

    metrics_url: str

    def counters(self) -> dict[str, int]:
        return {"lookup_hit_blocks": scraped(self.metrics_url, READ, late=True)}


def installed() -> Path:
    """Where LMCache lies; installs it there if need be."""
    if not (FOLDER / "lmcache").is_dir():
        print(f"  installing LMCache {VERSION} for the comparison, once", flush=True)
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)),
            *PACKAGES,
        ]
        done = subprocess.run(command, timeout=INSTALL_S, capture_output=True, text=True)
        if done.returncode:
            raise PdxError(f"LMCache {VERSION} can't be installed: {done.stderr.strip()[-500:]}")
    return FOLDER


def lmcache(
    scratch: Scratch, name: str, *, transport: str, memory_gib: float, block_tokens: int, flags: Sequence[str] = ()
) -> LmcacheArm:
    rig = scratch.rig(name)
    mode, server_flags = TRANSPORTS[transport]
    paths = {"PYTHONPATH": os.pathsep.join([import_path()["PYTHONPATH"], str(installed())])}
    surroundings = {**ENVIRONMENT, **QUIET, **paths}
    port, http_port = free_ports(2)
    server = rig.start_program(
        "server",
        [
            *(sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--http-host", "127.0.0.1", "--http-port", str(http_port)),
            *("--supported-transfer-mode", mode, "--l1-size-gb", str(memory_gib), "--chunk-size", str(block_tokens)),
            *("--eviction-policy", "LRU", "--disable-grpc-metrics", *server_flags),
            # By default an engine that is stopped for two minutes, as idle arms are, is forgotten for good.
            *("--worker-reap-timeout-seconds", "0"),
        ],
        environment=surroundings, cpus=DECODE_CPUS,
    )  # fmt: skip
    health = f"http://127.0.0.1:{http_port}/healthcheck"
    wait_until(lambda: get(health) == 200 or server.process.poll() is not None, START_S, "LMCache serves")
    if server.process.poll() is not None:
        raise PdxError(f"LMCache ended by itself, see {server.log}:\n{tail(server.log)}")
    transfer = {
        "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port},
    }  # fmt: skip
    engine = start_plain(
        rig, "engine", PREFILL_CPUS,
        ("--disable-hybrid-kv-cache-manager", "--kv-transfer-config", json.dumps(transfer), *flags),
        environment={
            **surroundings, "LMCACHE_MP_TRANSFER_MODE": mode, "GLOO_SOCKET_IFNAME": "lo", "PYTHONHASHSEED": "0",
        },
    )  # fmt: skip
    wait_engines([engine])
    arm = LmcacheArm(scratch, name, engine.url, [engine, server], ready=serving(engine))
    arm.metrics_url = f"http://127.0.0.1:{http_port}/metrics"
    arm.pause()
    return arm
