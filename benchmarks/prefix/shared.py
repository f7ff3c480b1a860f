"""A system prompt that all requests share: what only the engine's own cache would be needed for.

Nothing is to be gained here as long as the engine lives, so nothing may be lost; once the engine has forgotten, as
after a restart, what lies below it answers for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.measure import median, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.harness.ways import interleaved
from benchmarks.prefix.engines import CachingArm

SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 1024, 200, 16
QUESTIONS = 4  # of one round
BASE, OURS = "plain", "pdx"
LOST_MAX, GAINED_MIN = 1.05, 2.0


def measure(arms: Sequence[CachingArm], rounds: int, report: Report) -> None:
    system = prompt_of(SYSTEM_TOKENS, 555)
    warm: dict[str, list[float]] = {arm.name: [] for arm in arms}
    forgotten: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number, arm in interleaved(arms, rounds):
        report.progress(f"shared system prompt, round {number + 1} of {rounds}: {arm.name}")
        questions = [prompt_of(QUESTION_TOKENS, 1000 * number + each) for each in range(QUESTIONS + 1)]
        arm.ask(system + questions[0], ANSWER_TOKENS)
        warm[arm.name] += [arm.ask(system + each, ANSWER_TOKENS).first_token_s for each in questions[1:]]
        arm.forget()
        forgotten[arm.name].append(arm.ask([*system, *questions[0][::-1]], ANSWER_TOKENS).first_token_s)
    base, ours = median(warm[BASE]), median(warm[OURS])
    report.bar("shared system prompt, in the engine's own cache: first token, pdx / plain", round(ours / base, 3),
               f"<= {LOST_MAX}", ours / base <= LOST_MAX)  # fmt: skip
    gained = median(forgotten[BASE]) / median(forgotten[OURS])
    report.bar("shared system prompt, forgotten by the engine: first token, plain / pdx", round(gained, 2),
               f">= {GAINED_MIN}", gained >= GAINED_MIN, unit="x")  # fmt: skip
    report.figures["shared system prompt"] = {"warm_s": warm, "forgotten_s": forgotten}
    rows = [[name, f"{median(warm[name]) * 1e3:.1f}", f"{median(forgotten[name]) * 1e3:.1f}"] for name in warm]
    table("A shared system prompt: first token, medians in ms", ("arm", "own cache", "forgotten"), rows)
