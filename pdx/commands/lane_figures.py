"""A figure for each lane: verified puts between two processes of this host, and one memcpy to compare it with."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pdx.commands.finding import Finding, State
from pdx.config import import_path
from pdx.transport.rdma import rdma_here
from pdx.transport.registry import OVER_RDMA, known_schemes

PROBE_S = 60.0  # NIXL's libraries alone take 10 s to load on a busy machine
END_S = 10.0
MEMCPY_BYTES = 64 << 20
INSTALL = "pip install "


def memory_finding() -> Finding:
    source, target = bytearray(MEMCPY_BYTES), bytearray(MEMCPY_BYTES)
    memoryview(target)[:] = source  # touches both
    started_s = time.perf_counter()
    memoryview(target)[:] = source
    took_s = time.perf_counter() - started_s
    return Finding(item="memcpy", state="ok", line=f"{MEMCPY_BYTES / took_s / 1e9:.1f} GB/s")


def lane_findings(schemes: Sequence[str] | None) -> Iterator[Finding]:
    """tcp is needed, all others are absent at worst."""
    for scheme in known_schemes() if schemes is None else schemes:
        item, outcome = f"lane {scheme}", probe(scheme)
        if isinstance(outcome, float):
            line = f"{outcome / 1e9:.2f} GB/s between two processes, verified"
            yield Finding(item=item, state="ok", line=f"{line}{_when_taken(scheme)}")
        else:
            line, install, package = outcome.partition(INSTALL)
            state: State = "missing" if scheme == "tcp" else "absent"
            yield Finding(item=item, state=state, line=line.rstrip(": "), fix=install + package)


def probe(scheme: str) -> float | str:
    """Bytes a second, or why there are none. Leaves no process behind."""
    deadline_s = time.monotonic() + PROBE_S
    key = secrets.token_hex(32)
    with _end("receive", scheme, key) as receiver:
        where = _answer(receiver, deadline_s)
        if "error" in where:
            return str(where["error"])
        with _end("send", scheme, key) as sender:
            _tell(sender, json.dumps(where))
            for end in (sender, receiver):
                said = _answer(end, deadline_s)
                if "error" in said:
                    return str(said["error"])
        return float(said["bytes_per_s"])


def _when_taken(scheme: str) -> str:
    if scheme == "tcp" or (scheme in OVER_RDMA and rdma_here().devices):
        return ""
    return f"; taken where it is asked for: pdxd --transport {scheme}"


@contextmanager
def _end(role: str, scheme: str, key: str) -> Iterator[subprocess.Popen[str]]:
    """One process of lane_probe, that has the key."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pdx.commands.lane_probe", role, scheme], env={**os.environ, **import_path()},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        _tell(process, key)
        yield process
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        pass  # it has said what it had to
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended: its answer will tell
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def _answer(process: subprocess.Popen[str], deadline_s: float) -> dict[str, Any]:
    """The next line that it says; why there is none, as an error."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(max(0.0, deadline_s - time.monotonic())):
            return {"error": f"nothing within {PROBE_S:g} s"}
    line = process.stdout.readline()
    if not line:
        return {"error": f"its process ended with status {process.wait(END_S)}"}
    said: dict[str, Any] = json.loads(line)
    return said
