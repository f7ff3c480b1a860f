"""What saving costs where nothing is ever asked for again, beside a plain engine and a second one as a control."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.measure import bootstrap_interval, median, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.harness.ways import interleaved
from benchmarks.prefix.engines import CachingArm

PROMPT_TOKENS, ANSWER_TOKENS = 1024, 48
BASE, CONTROL, OURS = "plain", "control", "pdx"
FIRST_TOKEN_MAX, ITL_MAX, EXCLUDED = 1.01, 1.02, 1.03
FIRST_SEED = 10_000


def measure(arms: Sequence[CachingArm], rounds: int, report: Report) -> None:
    """Ratios within a round."""
    first: dict[str, list[float]] = {arm.name: [] for arm in arms}
    gaps: dict[str, list[float]] = {arm.name: [] for arm in arms}
    whole: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number, arm in interleaved(arms, rounds):
        report.progress(f"zero reuse, round {number + 1} of {rounds}: {arm.name}")
        timing = arm.ask(prompt_of(PROMPT_TOKENS, FIRST_SEED + number), ANSWER_TOKENS)
        first[arm.name].append(timing.first_token_s)
        gaps[arm.name].append(median(timing.gaps_s))
        whole[arm.name].append((timing.ended_ns - timing.sent_ns) / 1e9)
    rows = []
    for what, samples, most in (
        ("first token", first, FIRST_TOKEN_MAX), ("whole request", whole, FIRST_TOKEN_MAX), ("ITL", gaps, ITL_MAX),
    ):  # fmt: skip
        rows.append(_judge(what, samples, most, report))
    table("Zero reuse: ratios within a round, with their 95 % intervals", ("", "plain ms", "pdx / plain",
          "A/A: control / plain"), rows)  # fmt: skip


def _judge(what: str, samples: dict[str, list[float]], most: float, report: Report) -> list[str]:
    base = samples[BASE]
    ours = [own / plain for own, plain in zip(samples[OURS], base, strict=True)]
    control = [own / plain for own, plain in zip(samples[CONTROL], base, strict=True)]
    ratio, (low, high) = median(ours), bootstrap_interval(ours, seed=1)
    control_low, control_high = bootstrap_interval(control, seed=2)
    report.bar(f"zero reuse, {what}: pdx / plain", round(ratio, 4), f"<= {most}", ratio <= most)
    report.bar(f"zero reuse, {what}: 95 % interval excludes {EXCLUDED}", f"{low:.4f} to {high:.4f}", f"< {EXCLUDED}",
               high < EXCLUDED)  # fmt: skip
    report.figures[f"zero reuse, {what}"] = {"samples_s": samples, "ratio": ratio, "control": median(control)}
    for peer in samples.keys() - {BASE, CONTROL, OURS}:
        theirs = median([own / plain for own, plain in zip(samples[peer], base, strict=True)])
        report.figures[f"zero reuse, {what}, {peer} / plain"] = theirs
        print(f"  {what}, {peer} / plain: {theirs:.4f}")
    shown = f"{median(control):.4f} ({control_low:.4f} to {control_high:.4f})"
    return [what, f"{median(base) * 1e3:.1f}", f"{ratio:.4f} ({low:.4f} to {high:.4f})", shown]
