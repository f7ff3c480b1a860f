"""Which RDMA devices this process can use. Reads the kernel's files; loads no library."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

DEVICES = Path("/sys/class/infiniband")
# Where a process opens them. Containers see the devices of their host, but not always these files.
VERBS = Path("/dev/infiniband")
ACTIVE = "ACTIVE"


class Rdma(msgspec.Struct, frozen=True):
    """`devices` have an active port and can be opened; `lack` says in a few words why there is none."""

    devices: tuple[str, ...]
    lack: str = ""


def rdma_here(devices: Path = DEVICES, verbs: Path = VERBS) -> Rdma:
    found = sorted(path.name for path in devices.glob("*"))
    active = tuple(name for name in found if _has_active_port(devices / name))
    if not found:
        return Rdma((), "no RDMA device here")
    if not active:
        return Rdma((), f"no port of {', '.join(found)} is active")
    if not any(os.access(path, os.R_OK | os.W_OK) for path in verbs.glob("uverbs*")):
        return Rdma((), f"{', '.join(active)} can't be opened: {verbs}/uverbs* is not there for this process")
    return Rdma(active)


def _has_active_port(device: Path) -> bool:
    return any(ACTIVE in _read(state) for state in device.glob("ports/*/state"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:  # unplugged, or not ours to read
        return ""
