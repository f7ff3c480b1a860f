"""Kinds of KV cache that the demo model has not: sliding windows beside full attention, and MLA's latents.

A tiny random model of each kind (benchmarks/tiny) on a real pair of vLLM engines over tcp, in digest mode: every prompt
must go through the pair, every page that decode needs must be the one that prefill computed, and the answer must be
that of the decode engine alone, token for token (float32: no near ties). Prompts lie on both sides of block and window
boundaries, cached and uncached at prefill, seeded and paired. The control flips one byte a page: every load must be
refused, no answer may change. The full run takes about 5 minutes. No time is measured here.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tiny
from benchmarks.harness.arms import PdxPair, Scratch, pdx_pair
from benchmarks.harness.measure import pin_client, prompt_of
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import Reply, post, stats, unleased, wait_until
from benchmarks.skeleton import flip_every_page

ARENA = {"arena": "256MiB", "digest_mode": "true", "poison": "true"}
EXTENT_BYTES = 32 << 20  # an eighth of the arena: what the daemon makes of it
TOKENS = 12
LAND_S = 10.0
TURN_TOKENS = 300
FULL = (1, 15, 16, 17, 100, 127, 128, 129, 199, 200, 201, 327, 328, 511, 512, 513, 1000, 1500, 2500)
QUICK = (1, 17, 128, 201, 327, 1500)
PAIRED = {"presence_penalty": 0.1}  # must see every token of an answer: prefill's first one can't be the seed


@dataclass(frozen=True)
class Kind:
    layers: int
    windowed_layers: int
    block_tokens: int
    flags: tuple[str, ...]
    agrees: bool  # vLLM's kernels for prompts and for single tokens find the same next token

    def pages(self, tokens: int) -> int:
        """That a request needs of which so many tokens are loaded."""
        behind = max(0, tokens - tiny.WINDOW + 1) // self.block_tokens
        return self.layers * -(-tokens // self.block_tokens) - self.windowed_layers * behind


# On CPUs vLLM computes MLA prompts in one piece, in blocks of 16 tokens. Its two kernels for them disagree: one plain
# engine, asked for two tokens, gives another second one than if asked to go on behind the first. So an answer can be
# compared only where the same kernel has made each of its tokens; the pages are compared everywhere.
KINDS = {
    "hybrid": Kind(6, 4, 128, ("--max-num-batched-tokens", "512"), agrees=True),
    "latent": Kind(3, 0, 16, (), agrees=False),
}


class Handing:
    """Requests through one pair, and what its decode side's daemon counts of them."""

    def __init__(self, pair: PdxPair, kind: Kind, report: Report, label: str) -> None:
        self._pair, self._kind, self._report, self._label = pair, kind, report, label
        self.source, self.target = pair.tools()

    def ask(self, prompt: list[int], *, url: str = "", **more: Any) -> Reply:
        return self._pair.rig.complete(prompt, url=url, max_tokens=TOKENS, **more)

    def counts(self) -> dict[str, int]:
        return dict(stats(self.target)["counters"])

    def judge(self, what: str, prompts: list[list[int]], **more: Any) -> None:
        """Bars: handed over, bit-identical, the answer of one engine alone."""
        before = self.counts()
        replies = [self.ask(prompt, **more) for prompt in prompts]
        name = f"{self._label}, {what}"
        self._report.equal(f"{name}: all leases end", unleased(self.source, self.target), True)
        grown = {key: count - before.get(key, 0) for key, count in self.counts().items()}
        handed = sum("x-pdx-prefill" in reply.headers for reply in replies)
        self._report.equal(f"{name}: handed over", handed, len(prompts))
        self._report.equal(f"{name}: loads failed", grown.get("loads_failed", 0), 0)
        target = sum(self._kind.pages(self._loaded(prompt, more)) for prompt in prompts)
        self._report.equal(f"{name}: pages bit-identical", grown.get("pages_verified", 0), target)
        if more and not self._kind.agrees:
            return
        decode = self._pair.decode.url
        alone = [self.ask(prompt, url=decode, cache_salt="alone", **more).text for prompt in prompts]
        same = sum(reply.status == 200 and reply.text == text for reply, text in zip(replies, alone, strict=True))
        self._report.equal(f"{name}: answers of the engine alone", same, len(prompts))

    def _loaded(self, prompt: list[int], more: dict[str, Any]) -> int:
        """A paired request computes its last token itself; where there are windows, it does not load it either."""
        return len(prompt) - bool(more and self._kind.windowed_layers)

    def control(self) -> None:
        """One byte of each page is flipped in its slot, between the time when it lands and decode's look at it."""
        prompt = prompt_of(700, 99)
        alone = self.ask(prompt, url=self._pair.decode.url, cache_salt="alone")
        before = self.counts()
        pages = before["pages_landed"] + self._kind.layers * -(-len(prompt) // self._kind.block_tokens)
        with ThreadPoolExecutor(1) as client:
            self._pair.decode.signal(signal.SIGSTOP)
            try:
                asked = client.submit(self.ask, prompt)
                wait_until(lambda: self.counts()["pages_landed"] >= pages, LAND_S, "all pages have landed")
                flip_every_page(self._pair.rig, self._pair.daemons[1], extent_bytes=EXTENT_BYTES)
            finally:
                self._pair.decode.signal(signal.SIGCONT)
            spoilt = asked.result()
        refused = self.counts().get("loads_failed", 0) - before.get("loads_failed", 0)
        self._report.equal(f"{self._label}, control, one flipped byte a page: loads refused", refused, 1)
        # What is computed again is prefill's first token too, and that by the kernel for prompts.
        same = spoilt.status == 200 and (spoilt.text == alone.text or not self._kind.agrees)
        self._report.equal(f"{self._label}, control: the same answer by recompute", same, True)


def run(label: str, report: Report, lengths: tuple[int, ...], folder: Path) -> None:
    kind = KINDS[label]
    with Scratch(tiny.write(label, folder / label)) as scratch:
        pair = pdx_pair(
            scratch, label, engine_flags=(*tiny.FLAGS, *kind.flags), daemon_settings=ARENA,
            environment={"VLLM_SERVER_DEV_MODE": "1"},
        )  # fmt: skip
        with pair.active():
            handing = Handing(pair, kind, report, label)
            handing.judge(f"{len(lengths)} prompts", [prompt_of(length, 1) for length in lengths])
            handing.judge("paired", [prompt_of(length, 2) for length in lengths], **PAIRED)
            first = prompt_of(lengths[-1], 3)
            handing.judge("a first turn", [first])
            second = [*first, *prompt_of(TURN_TOKENS, 4)]
            post(f"{pair.decode.url}/reset_prefix_cache", {}, deadline_s=10)
            handing.judge("the next turn, cached at prefill", [second])
            handing.control()
        report.arm(pair)
        pair.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench layouts", description=__doc__)
    options(parser)
    flags = parser.parse_args(argv)
    pin_client()
    report = Report("layouts")
    with tempfile.TemporaryDirectory(prefix="pdx-layouts-") as folder:
        for label in KINDS:
            run(label, report, QUICK if flags.quick else FULL, Path(folder))
    report.write(flags.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
