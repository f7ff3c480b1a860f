"""How long a hit takes: time to the first token when the engine's own cache has the prompt, and when a tier below has.

In every round each arm computes a prompt, answers it from its own cache, forgets that cache, and answers it from below.
The cost of a hit is the difference of the two, so that everything which they share, the step above all, is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.harness.measure import fit, median, memcpy_rate, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.prefix.engines import CachingArm
from pdx.errors import PdxError

SIZES = (512, 1024, 1792, 3500)
BLOCK_TOKENS, TOKEN_BYTES = 128, 23_040  # of the demo model: 30 layers of 3 KV heads of 64, keys and values, bfloat16
FIXED_MS, COPY_SHARE = 4.0, 0.7
ANSWER_TOKENS = 4
WARM_SIZE = 640


@dataclass
class Hits:
    """Seconds to the first token, by size: of a computed prompt, of one in the engine's own cache, and from below."""

    computed: dict[int, list[float]] = field(default_factory=dict)
    own: dict[int, list[float]] = field(default_factory=dict)
    below: dict[int, list[float]] = field(default_factory=dict)

    def cost_s(self, size: int) -> float:
        pairs = zip(self.below[size], self.own[size], strict=True)
        return median([below - own for below, own in pairs])


def measure(arms: Sequence[CachingArm], rounds: int, report: Report) -> None:
    taken = {arm.name: Hits() for arm in arms}
    for arm in arms:
        with arm.active():
            _one(arm, Hits(), WARM_SIZE, seed=-1)
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else list(reversed(arms)):
            report.progress(f"hits, round {number + 1} of {rounds}: {arm.name}")
            with arm.active():
                for size in SIZES:
                    _one(arm, taken[arm.name], size, seed=number)
    _judge(taken, report)


def _one(arm: CachingArm, hits: Hits, size: int, *, seed: int) -> None:
    """One prompt in its three ways. Raises PdxError where an answer differs or a hit was none."""
    prompt = prompt_of(size, seed)
    computed = arm.ask(prompt, ANSWER_TOKENS)
    own = arm.ask(prompt, ANSWER_TOKENS)
    arm.forget()
    before = arm.counters()
    below = arm.ask(prompt, ANSWER_TOKENS)
    after = arm.counters()
    if not own.text == below.text:
        raise PdxError(f"{arm.name}, {size} tokens: {own.text!r} from its own cache, {below.text!r} from below")
    blocks = (size - 1) // BLOCK_TOKENS
    found = after.get("lookup_hit_blocks", 0) - before.get("lookup_hit_blocks", 0)
    if arm.tool is not None and found != blocks:
        raise PdxError(f"{arm.name}, {size} tokens: {found} of {blocks} blocks were found below")
    hits.computed.setdefault(size, []).append(computed.first_token_s)
    hits.own.setdefault(size, []).append(own.first_token_s)
    hits.below.setdefault(size, []).append(below.first_token_s)


def _judge(taken: dict[str, Hits], report: Report) -> None:
    memcpy = memcpy_rate()
    report.figures["memcpy_gb_per_s"] = round(memcpy / 1e9, 2)
    rows = []
    for name, hits in taken.items():
        sizes_bytes = [size // BLOCK_TOKENS * BLOCK_TOKENS * TOKEN_BYTES for size in SIZES]
        line = fit(sizes_bytes, [hits.cost_s(size) for size in SIZES])
        report.figures[f"hit cost, {name}"] = {"fixed_ms": line.fixed_ms, "gb_per_s": line.gb_per_s}
        for size, size_bytes in zip(SIZES, sizes_bytes, strict=True):
            cost_ms, copy_ms = hits.cost_s(size) * 1e3, size_bytes / memcpy * 1e3
            rows.append([
                name, size, *(f"{median(each[size]) * 1e3:.1f}" for each in (hits.computed, hits.own, hits.below)),
                f"{cost_ms:.1f}", f"{copy_ms:.1f}",
            ])  # fmt: skip
            if name == "pdx":
                allowed = FIXED_MS + copy_ms / COPY_SHARE
                report.bar(f"hit of {size} tokens from memory, over the engine's own cache", round(cost_ms, 1),
                           f"<= {allowed:.1f}", cost_ms <= allowed, unit="ms")  # fmt: skip
        print(f"  {name}: a hit costs {line}")
    report.figures["hits"] = {name: vars(hits) for name, hits in taken.items()}
    table("Time to the first token, medians in ms", ("arm", "tokens", "computed", "own cache", "from below",
          "the hit costs", "ceiling: memcpy of it"), rows)  # fmt: skip
