"""Are the pages that decode loads the pages that prefill computed, and the answers those of the same computation?

Digest mode compares blake3 digests of every page on both sides, over a lane and within one daemon, with prompts of 1 to
3,500 tokens, cached and uncached on either side, 8 at once, in an arena so small that it evicts. Then answers, token
for token: the paired journey and vLLM's NixlConnector pair do the same computation on the same bits, so theirs must be
equal; one plain engine computes the last prompt token in a batch of another shape, so that bf16 rounds differently: its
answers may part only at a near tie. The control flips one byte a page: every load must be refused, no answer change.
The full run takes 10 to 30 minutes, --quick leaves the single daemon out. No time is measured here.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.harness.answers import NEAR_TIE_NATS, Answer, answer_of, at_once, compare, near
from benchmarks.harness.arms import DECODE_CPUS, PdxPair, Scratch, pdx_pair, plain
from benchmarks.harness.measure import pin_client, prompt_of, table
from benchmarks.harness.peers import nixl_pair
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import counter, post, stats, unleased
from benchmarks.harness.ways import BLOCK_TOKENS
from benchmarks.model import build, element_bytes, layers_of
from benchmarks.skeleton import flip_every_page

CHUNK = ("--max-num-batched-tokens", "512")  # several prompt chunks in most prompts, the same cuts in every arm
ARENA_MIB = 64 * element_bytes()  # room for one prompt of 3,500 tokens and a half
DAEMON = {"arena": f"{ARENA_MIB}MiB", "digest_mode": "true", "poison": "true"}
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
EXTENT_BYTES = ARENA_MIB << 17  # an eighth of the arena: what the daemon makes of it
AT_ONCE = 8
TOGETHER = [prompt_of(200 + 37 * number, 70 + number) for number in range(AT_ONCE)]
CACHED_TOKENS = 600


@dataclass(frozen=True)
class Plan:
    lengths: tuple[int, ...]
    cached_prompts: int
    daemons: tuple[tuple[str, str], ...] = (("a", "b"), ("a", "a"))


def _full_lengths() -> tuple[int, ...]:
    """60: both sides of block boundaries, very short ones, the longest, and others between."""
    boundaries = [128 * blocks + off for blocks in range(1, 9) for off in (-1, 0, 1)]
    between = random.Random(60).sample(range(140, 1400), 20)
    return (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, *boundaries, *between, 2047, 2048, 2500, 3000, 3499, 3500)


FULL = Plan(_full_lengths(), cached_prompts=3)
QUICK = Plan((1, 2, 55, 127, 128, 129, 255, 256, 257, 384, 511, 512, 513, 700, 1025, 1400), 1, daemons=(("a", "b"),))


@dataclass(frozen=True)
class Answers:
    """Of one pair."""

    alone: list[Answer]  # one prompt after the other
    together: list[Answer]  # AT_ONCE of them


class Pages:
    """Counts of one pair's daemons between two looks, as bars."""

    def __init__(self, pair: PdxPair, report: Report, label: str) -> None:
        self._report, self._label = report, label
        self._source, self._target = pair.tools()
        self._layers = layers_of(pair.model)
        self._before = self._counts()

    def judge(self, what: str, blocks: int, *, more_blocks: int = 0) -> None:
        """`blocks`: that decode needed, each of a page a layer. `more_blocks`: that prefill may have loaded beside it,
        from the same daemon."""
        name = f"{self._label}, {what}"
        self._report.equal(f"{name}: all leases end", unleased(self._source, self._target), True)
        now = self._counts()
        grown = {key: now.get(key, 0) - self._before.get(key, 0) for key in now}
        self._before = now
        judge_pages(self._report, name, grown, blocks * self._layers, (blocks + more_blocks) * self._layers)

    def _counts(self) -> dict[str, int]:
        return dict(stats(self._target)["counters"])


def judge_pages(report: Report, name: str, grown: Mapping[str, int], least: int, most: int) -> None:
    """`grown`: decode's daemon's counters, by so much. What landed came for decode, and must have been verified."""
    report.equal(f"{name}: loads failed", grown.get("loads_failed", 0), 0)
    verified, landed = grown.get("pages_verified", 0), grown.get("pages_landed", 0)
    report.bar(f"{name}: pages bit-identical", verified, f"{least}" if least == most else f"{least} to {most}",
               max(least, landed) <= verified <= most)  # fmt: skip


def blocks_of(prompts: Iterable[Sequence[int]]) -> int:
    """That hold these prompts, whole or in part."""
    return sum(-(-len(prompt) // BLOCK_TOKENS) for prompt in prompts)


def run_pages(scratch: Scratch, report: Report, plan: Plan, daemons: tuple[str, str], *, transport: str) -> Answers:
    """Everything about pages on one pair; returns the answers to the prompts, for comparison."""
    landed = len(set(daemons)) == 2
    label, prompts = label_of(daemons, transport), prompts_of(plan)
    pair = pdx_pair(
        scratch, label.replace(" ", "-"), daemons=daemons, router_flags=("--journey", "paired"), engine_flags=CHUNK,
        daemon_settings=DAEMON | {"transport": transport}, environment=ENVIRONMENT,
    )  # fmt: skip
    with pair.active():
        pages = Pages(pair, report, label)
        answers = [answer_of(pair, prompt) for prompt in prompts]
        report.equal(f"{label}, {len(answers)} prompts: handed over", handed(answers), len(answers))
        taken = {name for name, count in stats(pair.tools()[0])["counters"].items() if count and "handoffs_by_" in name}
        report.equal(f"{label}: lanes taken", sorted(taken), [f"handoffs_by_{transport if landed else 'local'}"])
        pages.judge(f"{len(answers)} prompts", blocks_of(prompts))
        evicted = sum(stats(tool)["store"]["evicted_blocks"] for tool in set(pair.tools()))
        report.bar(f"{label}: blocks evicted meanwhile", evicted, "> 0", evicted > 0)
        for number in range(plan.cached_prompts):
            run_cached(pair, report, pages, label, number)
        together = at_once([partial(answer_of, pair, prompt) for prompt in TOGETHER])
        report.equal(f"{label}, {AT_ONCE} at once: handed over", handed(together), AT_ONCE)
        pages.judge(f"{AT_ONCE} at once", blocks_of(TOGETHER))
        if landed:
            run_control(pair, report)
    report.arm(pair)
    pair.stop()
    return Answers(answers, together)


def label_of(daemons: tuple[str, str], transport: str) -> str:
    return transport if len(set(daemons)) == 2 else "same daemon"


def handed(answers: Sequence[Answer]) -> int:
    return sum("x-pdx-prefill" in answer.headers for answer in answers)


def run_cached(pair: PdxPair, report: Report, pages: Pages, label: str, number: int) -> None:
    """One prompt, four times: in no cache, in prefill's own, in decode's own, in both."""
    prompt = prompt_of(CACHED_TOKENS + number, 50)
    blocks, whole = blocks_of([prompt]), len(prompt) // BLOCK_TOKENS
    one_daemon = len(set(pair.daemons)) == 1
    answers: list[Answer] = []
    for what, forget in {
        "uncached": (pair.prefill, pair.decode), "cached at prefill": (pair.decode,),
        "cached at decode": (pair.prefill,), "cached at both": (),
    }.items():  # fmt: skip
        for engine in forget:
            post(f"{engine.url}/reset_prefix_cache", {}, deadline_s=10)
        kept_below = one_daemon and pair.prefill in forget and bool(answers)  # what prefill itself has forgotten
        answers.append(answer_of(pair, prompt))
        needed = blocks if pair.decode in forget else blocks - whole
        pages.judge(f"{CACHED_TOKENS + number} tokens {what}", needed, more_blocks=whole if kept_below else 0)
    same = all(answer.tokens == answers[0].tokens for answer in answers)
    report.equal(f"{label}, {CACHED_TOKENS + number} tokens: the same answer wherever they were cached", same, True)


def run_control(pair: PdxPair, report: Report) -> None:
    """The naive reader would take what lies in the slots. One byte of each page is flipped there."""
    prompt = prompt_of(CACHED_TOKENS, 99)
    clean = answer_of(pair, prompt)
    target = pair.tools()[1]
    failed = counter(target, "loads_failed")
    flip_every_page(pair.rig, pair.daemons[1], extent_bytes=EXTENT_BYTES)
    post(f"{pair.decode.url}/reset_prefix_cache", {}, deadline_s=10)  # or decode would not need to load at all
    spoilt = answer_of(pair, prompt)
    report.equal("control, one flipped byte a page: loads refused", counter(target, "loads_failed") - failed, 1)
    report.equal("control, one flipped byte a page: same answer by recompute", near(clean, spoilt), True)


def run_answers(scratch: Scratch, report: Report, plan: Plan, ours: Mapping[str, Answers]) -> None:
    """The same prompts at the peers, one after another at each of them. `ours`: of each pair, by its label."""
    nixl, alone = nixl_pair(scratch, "NixlConnector", flags=CHUNK), plain(scratch, "plain", DECODE_CPUS, CHUNK)
    prompts = prompts_of(plan)
    with nixl.active(), alone.active():
        # At the plain engine each at once again: then most of the prompt is in its cache, and the rest is computed in
        # another shape. It shows how far one engine's own answers part.
        theirs, both = at_once([
            lambda: [answer_of(nixl, prompt) for prompt in prompts],
            lambda: [answer_of(alone, prompt) for prompt in prompts for _ in range(2)],
        ])  # fmt: skip
        together = [answer_of(alone, prompt) for prompt in TOGETHER]
    for label, answers in ours.items():
        judge_answers(report, label, prompts, answers, theirs, Answers(both[::2], together))
    show_partings(report, "control: one plain engine against itself, the prompt cached", prompts, both[1::2], both[::2])
    for arm in (nixl, alone):
        report.arm(arm)


def judge_answers(
    report: Report, label: str, prompts: Sequence[list[int]], ours: Answers, nixl: Sequence[Answer], plain: Answers
) -> None:
    """Those at once are batched as it happens, so theirs is never the same computation as anybody's."""
    equal = sum(left.tokens == right.tokens for left, right in zip(ours.alone, nixl, strict=True))
    report.equal(f"{label}, paired answers equal to the NixlConnector pair's, token for token", equal, len(prompts))
    for what, asked, mine, theirs in (
        ("", prompts, ours.alone, plain.alone), (f", {AT_ONCE} at once", TOGETHER, ours.together, plain.together),
    ):  # fmt: skip
        against = "one plain engine's"
        widest = show_partings(report, f"pdx, {label}{what} against {against}", asked, mine, theirs)
        report.bar(f"{label}{what}, answers that part from {against}: the widest tie", round(widest, 3),
                   f"<= {NEAR_TIE_NATS}", widest <= NEAR_TIE_NATS, unit="nats")  # fmt: skip


def show_partings(
    report: Report, title: str, prompts: Sequence[list[int]], left: Sequence[Answer], right: Sequence[Answer]
) -> float:
    """A line for each two answers that differ. Returns the nats of the widest tie at a first differing token."""
    partings = [compare(one, other) for one, other in zip(left, right, strict=True)]
    rows = [
        (len(prompt), parting.index, parting.left, parting.right, f"{parting.nats:.3f}", f"{parting.nats_right:.3f}")
        for prompt, parting in zip(prompts, partings, strict=True) if parting
    ]  # fmt: skip
    columns = ("prompt tokens", "parted at token", "left", "right", "apart at left, nats", "apart at right, nats")
    table(f"{title}: {len(rows)} of {len(prompts)} part", columns, rows)
    report.figures[title] = [dict(zip(columns, row, strict=True)) for row in rows]
    return max((max(parting.nats, parting.nats_right) for parting in partings if parting), default=0.0)


def prompts_of(plan: Plan) -> list[list[int]]:
    return [prompt_of(length, 1) for length in plan.lengths]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench identity", description=__doc__)
    options(parser)
    parser.add_argument("--transport", default="tcp", help="the lane between the two daemons (default tcp)")
    flags = parser.parse_args(argv)
    pin_client()
    plan = QUICK if flags.quick else FULL
    report = Report("identity")
    with Scratch(flags.model or build()) as scratch:
        answers = {
            label_of(daemons, flags.transport): run_pages(scratch, report, plan, daemons, transport=flags.transport)
            for daemons in plan.daemons
        }
        run_answers(scratch, report, plan, answers)
    report.write(flags.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
