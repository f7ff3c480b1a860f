"""Questions about long documents: a working set three times the engine's cache, asked for again and again.

That cache holds five requests at once, so that eight clients wait for one another beside it and not beside the ceiling.

Every document is read once, which is not measured. Then each question is a document and a few tokens of its own, at
one or eight clients, with short and long answers. The ceiling is an engine whose own cache holds everything.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.harness.measure import percentile, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.prefix.engines import CachingArm
from benchmarks.prefix.hits import BLOCK_BYTES, blocks_of

DOCUMENT_TOKENS, QUESTION_TOKENS = 3000, 32
DOCUMENTS = 16  # more would not fit into 24 GB, in all arms at once and with 32-bit numbers
WORKING_SET_BYTES = DOCUMENTS * blocks_of(DOCUMENT_TOKENS) * BLOCK_BYTES
SMALL_FLAGS = ("--kv-cache-memory-bytes", str(WORKING_SET_BYTES // 3))
UNLIMITED_FLAGS = ("--kv-cache-memory-bytes", str(WORKING_SET_BYTES * 5 // 4))
BELOW_GIB = round(WORKING_SET_BYTES * 5 / 4 / (1 << 30), 1)  # of memory below the engine's cache, ours and a peer's
CEILING_SHARE, PLAIN_FACTOR = 0.95, 15.0
SMALL, UNLIMITED = "plain", "plain, unlimited cache"


@dataclass(frozen=True)
class Case:
    clients: int
    answer_tokens: int
    questions: int

    def __str__(self) -> str:
        return f"{self.clients} clients, {self.answer_tokens} tokens"


FULL = tuple(Case(clients, tokens, 24) for clients in (1, 8) for tokens in (1, 16, 64))
QUICK = (Case(8, 16, 12),)
PLAIN_CASE = (8, 16)  # the plain engine with its small cache computes everything: one case is enough


@dataclass(frozen=True)
class Outcome:
    questions_per_s: float
    p95_first_token_s: float


def measure(arms: Sequence[CachingArm], cases: Sequence[Case], report: Report, *, peers: Sequence[str] = ()) -> None:
    """`peers`: arms of which ours must be as good in every case."""
    taken: dict[tuple[str, Case], Outcome] = {}
    numbers = itertools.count()
    for arm in arms:
        if arm.name != SMALL:
            report.progress(f"documents: {arm.name} reads")
            with arm.active():
                for document in range(DOCUMENTS):
                    arm.ask(prompt_of(DOCUMENT_TOKENS, document), 1)
    for number, case in enumerate(cases):
        for arm in arms if number % 2 == 0 else list(reversed(arms)):
            if arm.name != SMALL or (case.clients, case.answer_tokens) == PLAIN_CASE:
                report.progress(f"documents: {arm.name}, {case}")
                with arm.active():
                    taken[arm.name, case] = _ask(arm, case, numbers)
    _judge(taken, cases, report, peers)


def _ask(arm: CachingArm, case: Case, numbers: Iterator[int]) -> Outcome:
    """`case.clients` clients ask one question after the other, documents in turn."""
    questions = [
        prompt_of(DOCUMENT_TOKENS, number % DOCUMENTS) + prompt_of(QUESTION_TOKENS, next(numbers))
        for number in range(case.questions)
    ]
    began = time.monotonic()
    with ThreadPoolExecutor(case.clients) as clients:
        timings = list(clients.map(lambda question: arm.ask(question, case.answer_tokens), questions))
    seconds = time.monotonic() - began
    return Outcome(case.questions / seconds, percentile([timing.first_token_s for timing in timings], 95))


def _judge(taken: dict[tuple[str, Case], Outcome], cases: Sequence[Case], report: Report, peers: Sequence[str]) -> None:
    for case in cases:
        ours, ceiling = taken["pdx", case], taken[UNLIMITED, case]
        share = ours.questions_per_s / ceiling.questions_per_s
        report.bar(f"documents, {case}: throughput of an engine whose cache holds all", round(share, 3),
                   f">= {CEILING_SHARE}", share >= CEILING_SHARE)  # fmt: skip
        for peer in peers:
            times = ours.questions_per_s / taken[peer, case].questions_per_s
            report.bar(f"documents, {case}: throughput of {peer}", round(times, 3), ">= 1", times >= 1)
        plain = taken.get((SMALL, case))
        if plain is not None:
            factor = ours.questions_per_s / plain.questions_per_s
            report.bar(f"documents, {case}: over plain vLLM with the small cache", round(factor, 1),
                       f">= {PLAIN_FACTOR}", factor >= PLAIN_FACTOR, unit="x")  # fmt: skip
            later = ours.p95_first_token_s / plain.p95_first_token_s
            report.bar(f"documents, {case}: p95 of the first token, of plain's", round(later, 3), "<= 1", later <= 1)
    rows = [
        [name, str(case), f"{outcome.questions_per_s:.3f}", f"{outcome.p95_first_token_s:.2f}"]
        for (name, case), outcome in taken.items()
    ]
    report.figures["documents"] = rows
    table("Questions about documents", ("arm", "case", "questions/s", "p95 first token s"), rows)
