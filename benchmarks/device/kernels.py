"""The kernel pair beside a device-to-device copy of the same bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks.device.common import KIB, MIB, PAGE_BYTES, Bench, Work, build, seconds_of
from benchmarks.harness.measure import table
from benchmarks.harness.report import Report
from pdx.engine.kernels import Mode, reference

BAR, BAR_PAGE_BYTES = 0.90, 16 * KIB
BARRED = ("gather", "scatter", "gather + digest", "scatter + digest")  # with digests is what engines run
KERNEL_BYTES = 512 * MIB


def measure(report: Report, folder: Path, rounds: int) -> None:
    rows = []
    for page_bytes in PAGE_BYTES:
        bench = build(page_bytes, KERNEL_BYTES, folder)
        verify_kernels(bench)
        seconds = kernel_seconds(bench, rounds)
        floor = seconds["copy"]
        for name, taken in seconds.items():
            moved = KERNEL_BYTES * (1 if name == "digest" else 2)
            report.figures[f"{name}, pages of {page_bytes // KIB} KiB"] = {"gb_s": round(moved / taken / 1e9)}
        rows.append(
            (f"{page_bytes // KIB} KiB", f"{2 * KERNEL_BYTES / floor / 1e9:.0f}",
             *(f"{2 * KERNEL_BYTES / seconds[n] / 1e9:.0f} ({floor / seconds[n]:.2f})" for n in list(seconds)[1:-1]),
             f"{KERNEL_BYTES / seconds['digest'] / 1e9:.0f}")
        )  # fmt: skip
        for name in BARRED if page_bytes >= BAR_PAGE_BYTES else ():
            share = round(floor / seconds[name], 3)
            report.bar(
                f"{name}, pages of {page_bytes // KIB} KiB, of a device-to-device copy", share, f">= {BAR}",
                share >= BAR,
            )  # fmt: skip
    names = ("page", "copy", "gather", "scatter", "gather + digest", "scatter + digest", "digest (reads only)")
    table(f"GB/s read + written, {KERNEL_BYTES // MIB} MiB a launch (of the copy)", names, rows)


def kernel_seconds(bench: Bench, rounds: int) -> dict[str, float]:
    device, stream = bench.device, bench.device.new_stream()
    blocks = device.block_list(stream, bench.ids)
    staging = device.new_staging(bench.count)
    flat = bench.cache.view(-1)
    digests = torch.empty(bench.count, dtype=torch.int64, device="cuda")

    def launch(mode: Mode, digest: bool, run: int) -> None:
        device.launch(
            stream, mode, 0, blocks, bench.half(run), bench.count, None if mode == "look" else staging,
            digests.data_ptr() if digest else 0,
        )  # fmt: skip

    def copy(run: int) -> None:
        start = bench.half(run) * bench.page_bytes
        staging.memory.copy_(flat[start : start + staging.memory.numel()])

    arms: dict[str, Work] = {
        "copy": copy,
        "gather": partial(launch, "gather", False), "scatter": partial(launch, "scatter", False),
        "gather + digest": partial(launch, "gather", True), "scatter + digest": partial(launch, "scatter", True),
        "digest": partial(launch, "look", True),
    }  # fmt: skip
    return seconds_of(stream, arms, rounds)


def verify_kernels(bench: Bench) -> None:
    """Kernels and torch do the same to the same bytes, holes and all."""
    device, stream, count = bench.device, bench.device.new_stream(), min(bench.count, 64)
    ids = [-1 if n % 7 == 3 else block_id for n, block_id in enumerate(bench.ids[:count])]
    blocks, staging = device.block_list(stream, ids), device.new_staging(count)
    staging.memory.fill_(0x5A)
    expected = torch.full((1, count, bench.page_bytes), 0x5A, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    digests = device.gather(stream, 0, blocks, 0, count, staging)
    torch.cuda.synchronize()
    assert digests.read() == reference("gather", [bench.cache], ids, expected, digest=True)
    assert torch.equal(staging.memory.view_as(expected), expected)
    twin = bench.cache.clone()
    staging.memory.random_(0, 256)
    torch.cuda.synchronize()
    digests = device.scatter(stream, 0, blocks, 0, count, staging)
    looked = device.look(stream, 0, blocks, 0, count)
    torch.cuda.synchronize()
    wanted = reference("scatter", [twin], ids, staging.memory.view_as(expected), digest=True)
    assert digests.read() == wanted == looked.read()
    assert torch.equal(bench.cache, twin)
