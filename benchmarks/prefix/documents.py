"""Questions about long documents: a working set three times the engine's cache, asked for again and again.

That cache holds eight requests at once, so that no client waits for it that would not wait beside the ceiling, which is
an engine whose own cache holds everything. Every document is read once, which is not measured. Then each question is a
document and a few tokens of its own, at one or eight clients, with short and long answers. Ours is compared with one
arm after the other, in turns with each: all of them at once do not fit into 24 GB, with 32-bit numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.arms import DECODE_CPUS, PREFILL_CPUS
from benchmarks.harness.measure import percentile, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.prefix.engines import CachingArm
from benchmarks.prefix.hits import BLOCK_BYTES, blocks_of
from pdx.errors import PdxError

DOCUMENT_TOKENS, QUESTION_TOKENS = 3000, 32
CEILING_SHARE, PLAIN_FACTOR, FOUND_MIN = 0.95, 15.0, 0.9
SMALL, UNLIMITED = "plain", "plain, unlimited cache"
PLAIN_CASE = (8, 16)  # clients and tokens


@dataclass(frozen=True)
class Library:
    """So many documents, and the memory that arms have for them."""

    documents: int

    @property
    def nbytes(self) -> int:
        return self.documents * blocks_of(DOCUMENT_TOKENS) * BLOCK_BYTES

    @property
    def small_flags(self) -> tuple[str, str]:
        return _cache(self.nbytes // 3)

    @property
    def unlimited_flags(self) -> tuple[str, str]:
        return _cache(self.nbytes * 5 // 4)

    @property
    def below_gib(self) -> float:
        """Below the engine's cache."""
        return round(self.nbytes * 5 / 4 / (1 << 30), 1)

    @property
    def peer_gib(self) -> float:
        """A peer that evicts from a mark of 0.8 on has more, so that it loses nothing either."""
        return round(self.nbytes * 3 / 2 / (1 << 30), 1)


@dataclass(frozen=True)
class Case:
    clients: int
    answer_tokens: int
    questions: int

    def __str__(self) -> str:
        return f"{self.clients} clients, {self.answer_tokens} tokens"


FULL = tuple(Case(clients, tokens, 48 if tokens == 1 else 24) for clients in (1, 8) for tokens in (1, 16, 64))
QUICK = (Case(8, 16, 12),)
LIBRARY, QUICK_LIBRARY = Library(27), Library(4)


@dataclass(frozen=True)
class Outcome:
    questions_per_s: float
    p95_first_token_s: float
    found: float  # of the documents' blocks that were asked for, below the engine's cache


class Questions:
    """Asks each of its questions once."""

    def __init__(self, library: Library, cases: Sequence[Case], report: Report, *, file: Path | None) -> None:
        """`file`: to which the report goes, after every case."""
        self._file = file
        self._documents = library.documents
        self._cases = cases
        self._report = report
        self._numbers = itertools.count()
        self._turn = False
        self._rows: list[list[str]] = []
        report.figures["documents"] = self._rows

    def read(self, *arms: CachingArm) -> None:
        """Every document, so that arms may keep them: of two the second on the other core, for the time being."""
        self._report.progress(f"documents: {' and '.join(arm.name for arm in arms)} read")
        with contextlib.ExitStack() as stack:
            for arm, cpus in zip(arms, (PREFILL_CPUS, DECODE_CPUS), strict=False):
                stack.enter_context(arm.active())
                stack.enter_context(arm.part("engine").moved(cpus))
            readers = stack.enter_context(ThreadPoolExecutor(len(arms)))
            for reader in [readers.submit(self._read, arm) for arm in arms]:
                reader.result()

    def _read(self, arm: CachingArm) -> None:
        for document in range(self._documents):
            arm.ask(prompt_of(DOCUMENT_TOKENS, document), 1)

    def beside_ceiling(self, ours: CachingArm, ceiling: CachingArm) -> None:
        for case in self._cases:
            mine, best = self._asked(case, ours, ceiling)
            share = mine.questions_per_s / best.questions_per_s
            self._report.bar(f"documents, {case}: throughput of an engine whose cache holds all", round(share, 3),
                             f">= {CEILING_SHARE}", share >= CEILING_SHARE)  # fmt: skip
            self._report.keep(self._file)

    def beside_peer(self, ours: CachingArm, peer: CachingArm) -> None:
        for case in self._cases:
            mine, its = self._asked(case, ours, peer)
            if its.found < FOUND_MIN:
                raise PdxError(f"{peer.name} found {its.found:.0%} of what it had read: that is no comparison")
            times = mine.questions_per_s / its.questions_per_s
            self._report.bar(f"documents, {case}: throughput of {peer.name}", round(times, 3), ">= 1", times >= 1)
            self._report.keep(self._file)

    def beside_small(self, ours: CachingArm, small: CachingArm) -> None:
        """The small one keeps no document until it is asked for again, and computes all."""
        case = next(case for case in self._cases if (case.clients, case.answer_tokens) == PLAIN_CASE)
        mine, plain = self._asked(case, ours, small)
        factor = mine.questions_per_s / plain.questions_per_s
        later = mine.p95_first_token_s / plain.p95_first_token_s
        self._report.bar(f"documents, {case}: over plain vLLM with the small cache", round(factor, 1),
                         f">= {PLAIN_FACTOR}", factor >= PLAIN_FACTOR, unit="x")  # fmt: skip
        self._report.bar(f"documents, {case}: p95 of the first token, of plain's", round(later, 3), "<= 1", later <= 1)

    def show(self) -> None:
        table("Questions about documents", ("arm", "case", "questions/s", "p95 first token s", "found"), self._rows)

    def _asked(self, case: Case, *arms: CachingArm) -> list[Outcome]:
        """Of each arm; the order changes from case to case."""
        outcomes: dict[str, Outcome] = {}
        self._turn = not self._turn
        for arm in arms if self._turn else reversed(arms):
            self._report.progress(f"documents: {arm.name}, {case}")
            with arm.active():
                outcome = outcomes[arm.name] = self._ask(arm, case)
            rates = f"{outcome.questions_per_s:.3f}", f"{outcome.p95_first_token_s:.2f}", f"{outcome.found:.2f}"
            self._rows.append([arm.name, str(case), *rates])
            self._report.arm(arm)
        return [outcomes[arm.name] for arm in arms]

    def _ask(self, arm: CachingArm, case: Case) -> Outcome:
        """`case.clients` clients ask one question after the other, documents in turn."""
        questions = [
            prompt_of(DOCUMENT_TOKENS, number % self._documents) + prompt_of(QUESTION_TOKENS, next(self._numbers))
            for number in range(case.questions)
        ]
        found_before, began = hits_of(arm), time.monotonic()
        with ThreadPoolExecutor(case.clients) as clients:
            timings = list(clients.map(lambda question: arm.ask(question, case.answer_tokens), questions))
        seconds = time.monotonic() - began
        found = (hits_of(arm) - found_before) / (case.questions * blocks_of(DOCUMENT_TOKENS))
        return Outcome(case.questions / seconds, percentile([timing.first_token_s for timing in timings], 95), found)


def hits_of(arm: CachingArm) -> int:
    return arm.counters().get("lookup_hit_blocks", 0)


def _cache(nbytes: int) -> tuple[str, str]:
    return "--kv-cache-memory-bytes", str(nbytes)
