"""How long a hit takes: time to the first token when the engine's own cache has the prompt, and when a tier below has.

In every round each arm computes a prompt and then, several times, answers it from its own cache, forgets that cache,
and answers it from below; pdx once more from its disk, with nothing left in memory. The cost of a hit is the difference
of two answers, so that everything which they share, the step above all, is not in it. That difference is a few
milliseconds where one answer's time varies by fifteen: hence the repeats, which cost little beside the computing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.fio import read_rate
from benchmarks.harness.measure import Timing, fit, median, memcpy_rate, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.harness.ways import interleaved
from benchmarks.model import element_bytes
from benchmarks.prefix.engines import CachingArm, PdxArm
from pdx.errors import PdxError

SIZES = (512, 1024, 1792, 3500)  # tokens that a hit can bring; the prompt has one more, which is always computed
BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 30 * 3 * 64 * 2 * element_bytes()  # of the demo model: layers, KV heads, keys and values
FIXED_MS, COPY_SHARE, DISK_FACTOR = 4.0, 0.7, 1.3
ANSWER_TOKENS = 4
REPEATS = 5  # of the answers to a computed prompt
WARM_SIZE = 640
FIO_BYTES, FIO_DEPTH = 256 << 20, 4


@dataclass
class Hits:
    """Seconds to the first token, by size: of a computed prompt, of one in the engine's own cache, and from below."""

    computed: dict[int, list[float]] = field(default_factory=dict)
    own: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[int, list[float]] = field(default_factory=dict)
    disk: dict[int, list[float]] = field(default_factory=dict)

    def memory_s(self, size: int) -> float:
        """What a hit in memory costs more than one in the engine's own cache."""
        return median([below - own for below, own in zip(self.memory[size], self.own[size], strict=True)])

    def disk_s(self, size: int) -> float:
        """What a hit on the disk costs more than one in memory."""
        return median([below - above for below, above in zip(self.disk[size], self.memory[size], strict=True)])


def blocks_of(size: int) -> int:
    """Full blocks that a hit of this size brings, from the engine's own cache as from below."""
    return size // BLOCK_TOKENS


def measure(arms: Sequence[CachingArm], rounds: int, report: Report) -> dict[str, Hits]:
    taken = {arm.name: Hits() for arm in arms}
    for arm in arms:
        with arm.active():
            _one(arm, Hits(), WARM_SIZE, seed=-1)
    for number, arm in interleaved(arms, rounds):
        report.progress(f"hits, round {number + 1} of {rounds}: {arm.name}")
        for size in SIZES:
            _one(arm, taken[arm.name], size, seed=number)
    return taken


def _one(arm: CachingArm, hits: Hits, size: int, *, seed: int) -> None:
    """One prompt in its ways. Raises PdxError where an answer differs or a hit was none."""
    prompt = prompt_of(size + 1, seed)
    computed = arm.ask(prompt, ANSWER_TOKENS)
    hits.computed.setdefault(size, []).append(computed.first_token_s)
    for _ in range(REPEATS):
        own = arm.ask(prompt, ANSWER_TOKENS)
        hits.own.setdefault(size, []).append(own.first_token_s)
        memory = _from_below(arm, arm.forget, prompt, own)
        hits.memory.setdefault(size, []).append(memory.first_token_s)
        if isinstance(arm, PdxArm):
            disk = _from_below(arm, arm.forget_memory, prompt, own)
            hits.disk.setdefault(size, []).append(disk.first_token_s)


def _from_below(arm: CachingArm, forget: Callable[[], None], prompt: list[int], own: Timing) -> Timing:
    forget()
    before = arm.counters()["lookup_hit_blocks"]
    below = arm.ask(prompt, ANSWER_TOKENS)
    found = arm.counters()["lookup_hit_blocks"] - before
    if own.text != below.text:
        raise PdxError(f"{arm.name}, {len(prompt)} tokens: {own.text!r} from its own cache, {below.text!r} from below")
    blocks = blocks_of(len(prompt) - 1)
    if found < blocks:
        raise PdxError(f"{arm.name}, {len(prompt)} tokens: {found} of {blocks} blocks were found below")
    return below


def judge(taken: dict[str, Hits], report: Report, *, ours: str, peers: Sequence[str], fio_rate: float | None) -> None:
    """`fio_rate`: bytes per second of direct reads on the disk's file system."""
    memcpy = memcpy_rate()
    report.figures["memcpy_gb_per_s"] = round(memcpy / 1e9, 2)
    report.figures["fio_gb_per_s"] = None if fio_rate is None else round(fio_rate / 1e9, 2)
    rows = []
    for name, hits in taken.items():
        sizes_bytes = [blocks_of(size) * BLOCK_BYTES for size in SIZES]
        line = fit(sizes_bytes, [hits.memory_s(size) for size in SIZES])
        report.figures[f"hit cost, {name}"] = {"fixed_ms": line.fixed_ms, "gb_per_s": line.gb_per_s}
        print(f"  {name}: a hit in memory costs {line}")
        if hits.disk:
            line = fit(sizes_bytes, [hits.disk_s(size) for size in SIZES])
            report.figures[f"disk hit adds, {name}"] = {"fixed_ms": line.fixed_ms, "gb_per_s": line.gb_per_s}
            print(f"  {name}: a hit on the disk adds {line}")
        for size, size_bytes in zip(SIZES, sizes_bytes, strict=True):
            medians = (median(each[size]) * 1e3 for each in (hits.computed, hits.own, hits.memory))
            disk = f"{median(hits.disk[size]) * 1e3:.1f}" if hits.disk else "-"
            rows.append([
                name, size, *(f"{each:.1f}" for each in medians), disk,
                f"{hits.memory_s(size) * 1e3:.1f}", f"{size_bytes / memcpy * 1e3:.1f}",
            ])  # fmt: skip
    report.figures["hits"] = {name: vars(hits) for name, hits in taken.items()}
    table("Time to the first token, medians in ms", ("arm", "tokens", "computed", "own cache", "memory", "disk",
          "memory - own", "ceiling: memcpy of it"), rows)  # fmt: skip
    for size in SIZES:
        size_bytes = blocks_of(size) * BLOCK_BYTES
        cost_ms = taken[ours].memory_s(size) * 1e3
        allowed = FIXED_MS + size_bytes / (COPY_SHARE * memcpy) * 1e3
        report.bar(f"hit of {size} tokens in memory, over the engine's own cache", round(cost_ms, 1),
                   f"<= {allowed:.1f}", cost_ms <= allowed, unit="ms")  # fmt: skip
        for peer in peers:
            theirs_ms = taken[peer].memory_s(size) * 1e3
            report.bar(f"hit of {size} tokens in memory, against {peer}", round(cost_ms, 1), f"< {theirs_ms:.1f}",
                       cost_ms < theirs_ms, unit="ms")  # fmt: skip
        if fio_rate is not None:
            more_ms, allowed = taken[ours].disk_s(size) * 1e3, DISK_FACTOR * size_bytes / fio_rate * 1e3
            report.bar(f"hit of {size} tokens on the disk, over memory", round(more_ms, 1), f"<= {allowed:.1f}",
                       more_ms <= allowed, unit="ms")  # fmt: skip


def fio(folder: Path) -> float | None:
    """Bytes per second of direct reads, four under way, from a file of its own. None without fio."""
    file = folder / "fio"
    rate = read_rate(file, block_bytes=BLOCK_BYTES, total_bytes=FIO_BYTES, depth=FIO_DEPTH, order="read")
    if rate is None:
        print("  fio is not installed: no bar for the disk (apt-get install fio)", flush=True)
    file.unlink(missing_ok=True)
    return rate
