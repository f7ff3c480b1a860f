"""Chaos's naive variant: decode engines that are stopped in mid-load for longer than their lease, and then go on.

Once with pdx as it is, and once with daemons that take a failed handoff's slots back at once and workers that trust
what they read. Slots are overwritten when they are freed, as the next handoff would. Each request is a paired one, so
that decode reads while prefill computes; it is stopped as soon as its load has begun, and prefill as soon as a block
has landed that decode has not read, so that the handoff is not over when the lease is. Another one behind each goes
well, or the router would soon leave out a pair of daemons whose handoffs only fail.
"""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.call import Call, Heard
from benchmarks.chaos.plan import Wish
from benchmarks.chaos.questions import Known
from benchmarks.chaos.traffic import DEADLINE_S, body_of
from benchmarks.chaos.verdict import judge
from benchmarks.harness.part import Part
from benchmarks.harness.report import Report
from benchmarks.harness.rig import Rig, rig_in, stats, unleased, wait_until
from benchmarks.harness.ways import BLOCK_TOKENS

CHUNK = ("--max-num-batched-tokens", "128")  # small, so that reading goes on for a while
LEASE_S, STOPPED_S = 2, 5.0
DAEMON = {"arena": "256MiB", "poison": "true", "lease_s": str(LEASE_S)}
STOPS, SHARED_CHARACTERS, PROMPT_TOKENS_MIN = 6, 200, 300
LOADING_S = 20.0


def measure(model: Path, scratch: Path, report: Report, pool: Sequence[Known]) -> None:
    chosen, good = _unlike(pool), _short(pool)
    right = _arm(model, scratch / "pdx", chosen, good)
    naive = _arm(model, scratch / "naive", chosen, good, daemon="benchmarks.naive.hasty",
                 connector="benchmarks.naive.trusting")  # fmt: skip
    report.figures["stopped_readers"] = {"pdx": right, "naive": naive}
    print(f"  decode stopped for {STOPPED_S:g} s with a lease of {LEASE_S} s: pdx {dict(right)}, naive {dict(naive)}")
    report.equal("readers stopped past their lease: right answers", right["right"], len(chosen))
    report.bar("the naive variant (no quarantine, no check) answers wrongly", naive["wrong"], "> 0", naive["wrong"] > 0)


def _unlike(pool: Sequence[Known]) -> list[Known]:
    """Long questions that share no block: what decode had in its cache it would not read."""
    chosen: dict[str, Known] = {}
    for known in sorted(pool, key=lambda known: -known.prompt_tokens):
        if known.prompt_tokens >= PROMPT_TOKENS_MIN:
            chosen.setdefault(known.question.text[:SHARED_CHARACTERS], known)
    return list(chosen.values())[:STOPS]


def _short(pool: Sequence[Known]) -> list[Known]:
    """As many questions that decode reads in a moment."""
    return sorted(pool, key=lambda known: known.prompt_tokens)[:STOPS]


def _arm(
    model: Path,
    scratch: Path,
    chosen: Sequence[Known],
    good: Sequence[Known],
    *,
    daemon: str = "pdx.daemon.main",
    connector: str = "",
) -> Counter[str]:
    with rig_in(model, scratch) as rig:
        rig.start_router()
        for name in "ab":
            rig.start_daemon(name, module=daemon, **DAEMON)
        prefill = rig.start_engine("P0", "prefill", "a", cpu=0, flags=CHUNK, connector=connector)
        decode = rig.start_engine("D0", "decode", "b", cpu=1, connector=connector)
        rig.wait_routable(2)
        verdicts: Counter[str] = Counter()
        for number, (known, other) in enumerate(zip(chosen, good, strict=True)):
            verdicts[_stopped(rig, prefill, decode, number, known)] += 1
            _call(rig, _wish(number, other), other).run()
        return verdicts


def _stopped(rig: Rig, prefill: Part, decode: Part, number: int, known: Known) -> str:
    """The verdict on one request whose reader was stopped."""
    wish, heard = _wish(number, known), list[Heard]()
    call = _call(rig, wish, known)
    client = threading.Thread(target=lambda: heard.append(call.run()))
    client.start()
    tool = rig.tool("b")
    wait_until(lambda: any("loading" in half for half in stats(tool)["handoffs"]), LOADING_S, "decode loads")
    decode.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: _blocks_landed(tool, known) >= 2, LOADING_S, "a second block lands")
        prefill.signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
    finally:
        for engine in (decode, prefill):
            engine.signal(signal.SIGCONT)
    client.join(DEADLINE_S)
    unleased(rig.tool("a"), tool)
    verdict = judge(wish, known.answer(known.tokens), heard[0], left=False, router_died=False, deadline_s=DEADLINE_S)
    return verdict.kind


def _blocks_landed(tool: Any, known: Known) -> float:
    """Of the handoff that decode reads."""
    found = re.search(r"(\d+)/(\d+) pages landed, engine loading", " ".join(stats(tool)["handoffs"]))
    return int(found[1]) / int(found[2]) * math.ceil(known.prompt_tokens / BLOCK_TOKENS) if found else 0.0


def _wish(number: int, known: Known) -> Wish:
    return Wish(number, 0, known.tokens, streamed=False, unseedable=True, usage_asked=False)


def _call(rig: Rig, wish: Wish, known: Known) -> Call:
    body: dict[str, Any] = body_of(wish, known, str(rig.model))
    return Call(rig.url + known.question.path, body, deadline_s=DEADLINE_S)
