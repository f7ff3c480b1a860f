"""Whether loads go straight from the arena into the engine's blocks, or through staging: measured once a device.

Straight: the copy engine writes each page where it belongs, and a kernel only looks at it. Nothing is moved twice, but
every page is a copy of its own, and below some size the copy engine spends its time between copies. Through staging:
a few large copies, then the scatter kernel. Where the two meet depends on bus, driver and page size; so they are run
against each other when an engine with a new page size first starts, and the result is kept beside the kernels.

Saves always go through staging: straight copies would keep the engine from reusing its blocks until the bus is done.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from pdx.engine.device import CudaDevice, CudaDigests, CudaStream
from pdx.engine.kernels import keep
from pdx.engine.streams import Copy

PROBE_BYTES = 32 << 20
PROBE_BLOCKS_MAX = 2048  # of the engine's: nothing is in them yet
SLAB_BYTES = 1 << 20  # how much of one chunk lies side by side in the arena, as a rule
ROUNDS = 5
# Straight must win clearly enough to be no accident of the day; staging is what saves use anyway.
MARGIN = 0.98


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GB/s, arena to blocks."""

    staged: float
    straight: float

    @property
    def loads_straight(self) -> bool:
        return self.straight >= MARGIN * self.staged


def rates_of(device: CudaDevice, folder: Path) -> Rates:
    """From `folder`, or measured now: some 50 ms, in which blocks are overwritten. Raises DeviceLost, Refused."""
    path = folder / f"ways-{device.identity}.json"
    key = str(device.page_bytes)
    known = _read(path)
    if key not in known:
        known[key] = measure(device)
        keep(path, msgspec.json.encode(known))
    return known[key]


def measure(device: CudaDevice) -> Rates:
    """Runs both ways in turn over pinned memory of its own."""
    pages = max(1, min(PROBE_BYTES // device.page_bytes, device.num_blocks, PROBE_BLOCKS_MAX))
    run = max(1, SLAB_BYTES // device.page_bytes)
    copies = [Copy(first, min(run, pages - first), first * device.page_bytes) for first in range(0, pages, run)]
    memory = torch.zeros(pages * device.page_bytes, dtype=torch.uint8, pin_memory=True)
    arena, staging, stream = device.pinned(memory), device.new_staging(pages), device.new_stream()
    # Far apart, as an engine's blocks are: each page is a copy of its own.
    blocks = device.block_list(stream, [n * (device.num_blocks // pages) for n in range(pages)])

    def staged() -> CudaDigests:
        device.copy_in(stream, arena, staging, copies)
        return device.scatter(stream, 0, blocks, 0, pages, staging)

    def straight() -> CudaDigests:
        device.copy_straight(stream, arena, 0, blocks, copies)
        return device.look(stream, 0, blocks, 0, pages)

    seconds: dict[str, list[float]] = {"staged": [], "straight": []}
    for _ in range(ROUNDS):
        seconds["staged"].append(_timed(stream, staged))
        seconds["straight"].append(_timed(stream, straight))
    size = pages * device.page_bytes
    rates = {name: size / statistics.median(times[1:]) / 1e9 for name, times in seconds.items()}
    return Rates(round(rates["staged"], 2), round(rates["straight"], 2))


def _timed(stream: CudaStream, work: Callable[[], CudaDigests]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record(stream.torch)
    digests = work()
    after.record(stream.torch)
    after.synchronize()
    assert len(digests.read()) > 0
    return before.elapsed_time(after) / 1e3


def _read(path: Path) -> dict[str, Rates]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Rates])
    except (OSError, msgspec.DecodeError):
        return {}  # never measured, or by a pdx that kept something else
