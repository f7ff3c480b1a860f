"""What it costs to bring a page into the arena and out of it, beside what memory alone costs.

    python -m benchmarks.copier [--quick] [--json FILE]        some 60 s; 15 s with --quick

One core, cold memory: each arm walks over a cache and an arena of 320 MiB each (96 MiB with --quick, which may stay in
a large last-level cache), the arms take turns, and medians count. "memcpy" copies all bytes in one call, which may
bypass the caches; "pages" is a bare copy page by page, the floor of anything that also reads the page again. "numpy
rows" is the naive variant: the same checks through numpy's rows and one call for each header word.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import xxhash

from benchmarks.harness.measure import median, table
from benchmarks.harness.report import Report, options
from pdx.buffer.arena import Arena
from pdx.buffer.lease import Owner
from pdx.buffer.store import Store
from pdx.engine.copier import Copier, Rows
from pdx.layout import PageLayout, Place

LAYERS = 30
PAGE_BYTES = (4 << 10, 96 << 10, 1 << 20)
BAR_PAGE_BYTES = 96 << 10  # the demo's model: 128 tokens a block
BAR_GB_S = 5.5
TOTAL_BYTES, QUICK_BYTES = 320 << 20, 96 << 20
ROUNDS, QUICK_ROUNDS = 7, 3


@dataclass(frozen=True)
class Bench:
    """An engine's cache, an arena, and which block goes where: neighbours lie together nowhere but in their slot."""

    layout: PageLayout
    arena: Arena
    rows: list[Rows]
    spare: memoryview
    block_ids: list[int]
    places: tuple[Place, ...]
    copier: Copier

    @property
    def pages(self) -> int:
        return len(self.places) * LAYERS

    @property
    def total_bytes(self) -> int:
        return self.pages * self.layout.page_bytes

    def memcpy(self) -> None:
        self.spare[: self.total_bytes] = self.arena.memory[: self.total_bytes]

    def bare_pages(self, layer: int) -> None:
        size, slots, cache = self.layout.page_bytes, self.arena.memory, self.rows[layer].memory
        for block_id, place in zip(self.block_ids, self.places, strict=True):
            start, source = block_id * size, place.page_offset(self.layout, layer)
            cache[start : start + size] = slots[source : source + size]

    def gather(self, layer: int) -> None:
        self.copier.gather(self.rows[layer], self.block_ids, self.arena, self.places, layer)

    def scatter(self, layer: int) -> None:
        faults = self.copier.scatter(self.rows[layer], self.block_ids, self.arena, self.places, layer)
        assert not faults, faults

    def numpy_rows(self, layer: int) -> None:
        """The scatter that this one replaced."""
        arena, layout = self.arena, self.layout
        slots = np.frombuffer(arena.memory, dtype=np.uint8)
        blocks = np.frombuffer(self.rows[layer].memory, dtype=np.uint8).reshape(-1, layout.page_bytes)
        for block_id, place in zip(self.block_ids, self.places, strict=True):
            page, start = blocks[block_id], place.page_offset(layout, layer)
            page[:] = slots[start : start + layout.page_bytes]
            expected = arena.checksum(place, layer)
            assert arena.generation(place.header_offset) == place.generation
            assert xxhash.xxh3_64_intdigest(page.data) == expected


def build(page_bytes: int, total_bytes: int) -> Bench:
    layout = PageLayout(layers=LAYERS, page_bytes=page_bytes, chunk_blocks=2)
    blocks = max(2, total_bytes // layout.block_bytes)
    arena_bytes = blocks * (layout.unit_bytes + layout.header_bytes) + (64 << 20)
    arena = Arena.create(arena_bytes)
    store = Store(arena, extent_bytes=arena_bytes // 2 & ~4095, handoff_share=1.0)
    hashes = [n.to_bytes(4, "big") for n in range(blocks)]
    claim = store.claim(Owner("session", "bench"), b"n", layout, hashes, tail=False, now=0.0, ttl_s=1.0)
    assert claim is not None
    generator = np.random.default_rng(1)
    caches = [generator.integers(0, 256, (blocks, page_bytes), dtype=np.uint8) for _ in range(LAYERS)]
    order = list(range(blocks))
    random.Random(2).shuffle(order)
    spare = memoryview(np.ones(total_bytes, dtype=np.uint8))
    return Bench(
        layout, arena, [Rows(cache) for cache in caches], spare, order, claim.places, Copier(layout, digest_mode=False)
    )


def measured(bench: Bench, rounds: int) -> dict[str, float]:
    """Seconds of one walk, by arm. Walks are timed layer by layer: others' turns on the core spoil few of them."""
    arms: dict[str, Callable[[int], None]] = {
        "pages": bench.bare_pages, "gather": bench.gather, "scatter + verify": bench.scatter,
        "numpy rows": bench.numpy_rows,
    }  # fmt: skip
    verify(bench)
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", *arms)}
    for _ in range(rounds):
        seconds["memcpy"].append(_timed(bench.memcpy))
        for name, arm in arms.items():
            seconds[name] += [LAYERS * _timed(partial(arm, layer)) for layer in range(LAYERS)]
    return {name: median(times) for name, times in seconds.items()}


def verify(bench: Bench) -> None:
    """Every page goes out, and comes back as it was."""
    before = [xxhash.xxh3_64_intdigest(rows.memory) for rows in bench.rows]
    for layer, rows in enumerate(bench.rows):
        bench.gather(layer)
        rows.memory[:] = bytes(len(rows.memory))
        bench.scatter(layer)
    assert before == [xxhash.xxh3_64_intdigest(rows.memory) for rows in bench.rows], "pages changed on their way"


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pdx bench copier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser)
    arguments = parser.parse_args()
    total_bytes, rounds = (QUICK_BYTES, QUICK_ROUNDS) if arguments.quick else (TOTAL_BYTES, ROUNDS)
    report = Report("copier")
    for page_bytes in PAGE_BYTES:
        bench = build(page_bytes, total_bytes)
        seconds = measured(bench, rounds)
        rate = {name: bench.total_bytes / taken / 1e9 for name, taken in seconds.items()}
        cost = {name: taken / bench.pages * 1e6 for name, taken in seconds.items()}
        table(
            f"pages of {page_bytes >> 10} KiB, {bench.total_bytes >> 20} MiB",
            ("", "GB/s", "us a page", "of memcpy"),
            [(n, f"{rate[n]:.2f}", f"{cost[n]:.2f}", f"{rate[n] / rate['memcpy']:.0%}") for n in seconds],
        )
        for name in seconds:
            figure = {"gb_s": round(rate[name], 2), "us_a_page": round(cost[name], 2)}
            report.figures[f"{name}, {page_bytes >> 10} KiB"] = figure
        if page_bytes == BAR_PAGE_BYTES:
            for name in ("gather", "scatter + verify"):
                value = round(rate[name], 2)
                report.bar(
                    f"{name} of {page_bytes >> 10} KiB pages", value, f">= {BAR_GB_S}", value >= BAR_GB_S, unit="GB/s"
                )
        if page_bytes == min(PAGE_BYTES):  # where what Python adds to a page is most of its cost
            gain = round(rate["scatter + verify"] / rate["numpy rows"], 2)
            report.bar(f"scatter against numpy rows, {page_bytes >> 10} KiB", gain, ">= 1", gain >= 1, unit="x")
        bench.arena.close()
    report.write(arguments.json)
    sys.exit(0 if report.all_hold else 1)


if __name__ == "__main__":
    main()
