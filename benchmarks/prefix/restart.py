"""A daemon and an engine are killed while clients ask about documents: hits go on, and no request fails.

Two engines on one host behind a router, one pdxd with a disk. The daemon dies with all of its memory, and the engines
start it anew: what it had written is found on the disk. Then an engine dies in the midst of requests, and is started
again. Nobody streams, so that the router may give a request to the other engine.

An engine's own cache holds two questions, so that each question's document must be loaded anew: what counts are the
pages that engines have verified, not what the daemon has found. Answers are compared with those that an engine gave
from its own cache, right behind the document.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.harness.answers import RIVALS, Answer, near
from benchmarks.harness.arms import BUDGETS, DECODE_CPUS, PREFILL_CPUS, Scratch
from benchmarks.harness.measure import completion, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.harness.rig import Reply, Rig, post, stats, unleased, wait_until
from benchmarks.model import layers_of
from benchmarks.prefix.hits import BLOCK_BYTES, BLOCK_TOKENS, blocks_of
from pdx.errors import PdxError

DOCUMENTS, DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 6, 1500, 32, 8
CLIENTS, QUESTIONS = 3, 18  # in each of three parts: as usual, with a new daemon, with a new engine
ANSWER_S, WRITE_S, STRIKE_S = 120.0, 60.0, 1.0
SHARE = 0.9  # of the questions, that must load something
PAGES_SHARE = 0.8  # of the documents' pages: some beginnings are still in the engine's own cache
COUNTED = ("loads_ok", "loads_failed", "pages_verified")
ENGINES = {"E0": PREFILL_CPUS, "E1": DECODE_CPUS}
# Room for two questions, and vLLM's null block: of a document that was asked about before little is left.
CACHE_BLOCKS = 1 + 2 * -(-(DOCUMENT_TOKENS + QUESTION_TOKENS + ANSWER_TOKENS) // BLOCK_TOKENS)
SMALL_CACHE = ("--max-model-len", "2048", "--kv-cache-memory-bytes", str(CACHE_BLOCKS * BLOCK_BYTES))


def measure(scratch: Scratch, disk: Path, report: Report) -> None:
    rig = scratch.rig("restart")
    rig.start_router(*BUDGETS)
    daemon = rig.start_daemon("a", arena="512MiB", linger_s="600", disk=str(disk), disk_cap="4GiB")
    engines = {name: rig.start_engine(name, "both", "a", cpu=cpu, flags=SMALL_CACHE) for name, cpu in ENGINES.items()}
    rig.wait_routable(len(engines))
    report.progress("restart: documents are read")
    questions = [
        prompt_of(DOCUMENT_TOKENS, number % DOCUMENTS) + prompt_of(QUESTION_TOKENS, 10_000 + number)
        for number in range(QUESTIONS)
    ]
    first = _first_answers(rig, engines["E0"].url, questions)
    tool = rig.tool("a")
    wait_until(lambda: not stats(tool)["disk"]["waiting_writes"], WRITE_S, "the disk has everything")
    possible = QUESTIONS * blocks_of(DOCUMENT_TOKENS) * layers_of(rig.model)
    rows = []

    def part(name: str) -> None:
        report.progress(f"restart: {name}")
        tool = rig.tool("a")
        before = stats(tool)["counters"]
        replies = _asked(rig, questions)
        report.equal(f"restart, {name}: all leases end", unleased(tool), True)
        grown = {key: count - before.get(key, 0) for key, count in stats(tool)["counters"].items()}
        judge(f"restart, {name}", replies, first, grown, possible, report)
        found = grown.get("lookup_hit_blocks", 0) * layers_of(rig.model) / possible
        rows.append([name, len(replies), *(grown.get(key, 0) for key in COUNTED), f"{found:.3f}"])

    part("as usual")
    report.progress("restart: kill -9 of the daemon in mid-load")
    struck = _struck(rig, questions, lambda: daemon.signal(signal.SIGKILL))
    judge_answers("restart, while the daemon died", struck, first, report)
    rig.forget(daemon)
    rig.wait_routable(len(engines))  # which the router hears from the daemon that the engines have started
    part("with a new daemon")
    report.progress("restart: kill -9 of an engine in mid-load")
    struck = _struck(rig, questions, lambda: engines["E1"].signal(signal.SIGKILL))
    judge_answers("restart, while an engine died", struck, first, report)
    rig.forget(engines["E1"])
    rig.start_engine("E1", "both", "a", cpu=ENGINES["E1"], flags=SMALL_CACHE)
    part("with an engine that starts")
    rig.wait_routable(len(engines))
    part("with a new engine")
    report.figures["restart"] = rows
    table("Restarts", ("part", "requests", *COUNTED, "found below"), rows)


def judge(
    name: str, replies: Sequence[Reply], first: Sequence[Answer], grown: Mapping[str, int], possible: int,
    report: Report,
) -> None:  # fmt: skip
    """`grown`: the daemon's counters, by so much. `possible`: pages of all documents that were asked about."""
    judge_answers(name, replies, first, report)
    report.equal(f"{name}: loads failed", grown.get("loads_failed", 0), 0)
    loads, pages = grown.get("loads_ok", 0) / len(replies), grown.get("pages_verified", 0) / possible
    report.bar(f"{name}: loads of requests", round(loads, 3), f">= {SHARE}", loads >= SHARE)
    report.bar(f"{name}: the documents' pages that engines loaded and verified", round(pages, 3), f">= {PAGES_SHARE}",
               pages >= PAGES_SHARE)  # fmt: skip


def judge_answers(name: str, replies: Sequence[Reply], first: Sequence[Answer], report: Report) -> None:
    report.equal(f"{name}: requests that failed", sum(reply.status != 200 for reply in replies), 0)
    answered = [(reply, answer) for reply, answer in zip(replies, first, strict=True) if reply.status == 200]
    wrong = sum(not near(answer, _answer(reply)) for reply, answer in answered)
    report.equal(f"{name}: answers that are not the first ones", wrong, 0)


def _first_answers(rig: Rig, url: str, questions: Sequence[list[int]]) -> list[Answer]:
    """Every document is read once by one engine, and all questions about it asked, before the next one is."""
    answers: dict[int, Answer] = {}
    for document in range(DOCUMENTS):
        _read(url, rig.model, prompt_of(DOCUMENT_TOKENS, document))
        for number in range(document, len(questions), DOCUMENTS):
            answers[number] = _answer(_read(url, rig.model, questions[number]))
    return [answers[number] for number in range(len(questions))]


def _read(url: str, model: Path, prompt: list[int]) -> Reply:
    reply = _ask(url, model, prompt)
    if reply.status != 200:
        raise PdxError(f"a document could not be read: {reply.status} {reply.text}")
    return reply


def _struck(rig: Rig, questions: Sequence[list[int]], strike: Callable[[], None]) -> list[Reply]:
    """The replies when it strikes among them."""
    timer = threading.Timer(STRIKE_S, strike)
    timer.start()
    replies = _asked(rig, questions)
    timer.join()
    return replies


def _asked(rig: Rig, questions: Sequence[list[int]]) -> list[Reply]:
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(partial(_ask, rig.url, rig.model), questions))


def _ask(url: str, model: Path, prompt: list[int]) -> Reply:
    body = completion(model, prompt, ANSWER_TOKENS, logprobs=RIVALS, return_tokens_as_token_ids=True)
    return post(f"{url}/v1/completions", body, deadline_s=ANSWER_S)


def _answer(reply: Reply) -> Answer:
    return Answer(reply.logprobs["tokens"], reply.logprobs["top_logprobs"])
