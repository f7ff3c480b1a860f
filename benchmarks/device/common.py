"""What the parts share: a cache in random order, a pinned arena, and times on the device's own clock."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pdx.engine.device import CudaDevice, CudaPinned, CudaStream

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = (4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 96 * KIB, 256 * KIB, MIB)
PAGE_OF_8B_MODEL = 64 * KIB  # 16 tokens, 8 heads of 128, K and V, two bytes each
ARENA_BYTES = 512 * MIB

Work = Callable[[int], None]  # one run; its number says which half of the memory to take


@dataclass(frozen=True)
class Bench:
    """A cache of twice as many blocks as are moved at once, in random order."""

    device: CudaDevice
    cache: torch.Tensor
    ids: list[int]

    @property
    def page_bytes(self) -> int:
        return self.device.page_bytes

    @property
    def count(self) -> int:
        return len(self.ids) // 2

    def half(self, run: int) -> int:
        return (run & 1) * self.count


def build(page_bytes: int, total_bytes: int, folder: Path) -> Bench:
    blocks = 2 * (total_bytes // page_bytes)
    cache = torch.randint(0, 256, (blocks, page_bytes), dtype=torch.uint8, device="cuda")
    ids = list(range(blocks))
    random.Random(page_bytes).shuffle(ids)
    return Bench(CudaDevice([cache], folder), cache, ids)


def seconds_of(stream: CudaStream, arms: dict[str, Work], rounds: int) -> dict[str, float]:
    """Medians on the device's own clock, the arms in turn; each twice, of which the second time counts."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(rounds + 2):
        for name, work in arms.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(stream.torch):
                work(run)  # not timed: the host gets ahead, and the device's cache holds what this arm leaves in it
                before.record()
                work(run + 1)
            after.record(stream.torch)
            after.synchronize()
            if run >= 2:
                times[name].append(before.elapsed_time(after) / 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


@contextlib.contextmanager
def pinned_arena(device: CudaDevice) -> Iterator[CudaPinned]:
    """A memfd, as pdxd's arena is."""
    fd = os.memfd_create("bench-arena")
    try:
        os.ftruncate(fd, ARENA_BYTES)
        memory = memoryview(mmap.mmap(fd, ARENA_BYTES))
        memory[:] = random.Random(1).randbytes(MIB) * (ARENA_BYTES // MIB)  # and so every page is there
        arena = device.pin(memory)
        yield arena
        torch.cuda.synchronize()
        device.unpin(arena)
    finally:
        os.close(fd)
