"""A chat of eight turns through a pair: what crosses the wire in each turn, both ways, and what prefill computes.

Token-exact: a turn's prompt is the last one's prompt, the answer's token ids, and new tokens. Of two hosts, what the
last turn left whole must not cross again, and what decode has computed must not be computed again by prefill. Of one
host, nothing crosses at all. A turn's new tokens nobody has: prefill must compute them, and send them to another host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.harness.arms import PdxPair
from benchmarks.harness.counters import scraped
from benchmarks.harness.measure import completion, prompt_of, stream, table
from benchmarks.harness.report import Report
from benchmarks.harness.rig import stats, unleased
from benchmarks.prefix.hits import BLOCK_BYTES, BLOCK_TOKENS
from pdx.client import DaemonClient
from pdx.errors import PdxError

TURNS, FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 8, 600, 260, 200  # 4,020 of the model's 4,096
NEW_BYTES = TURN_TOKENS // BLOCK_TOKENS * BLOCK_BYTES  # of one turn at least, in whole blocks
ANSWER_S = 120.0
FACTOR = 1.1


@dataclass(frozen=True)
class Turn:
    prompt_tokens: int
    whole_before: int  # blocks that the last turn has left whole
    to_decode: int  # bytes
    to_prefill: int
    computed: int  # tokens, by the prefill engine
    paired: bool = True  # the router gave it to both engines

    @property
    def new_bytes(self) -> int:
        """Of the blocks that the last turn did not leave whole, up to this turn's last token."""
        return (-(-(self.prompt_tokens + ANSWER_TOKENS) // BLOCK_TOKENS) - self.whole_before) * BLOCK_BYTES

    @property
    def new_tokens(self) -> int:
        """Of the prompt, behind those blocks."""
        return self.prompt_tokens - self.whole_before * BLOCK_TOKENS


def measure(pairs: Sequence[PdxPair], report: Report) -> None:
    rows = []
    for pair in pairs:
        report.progress(f"chat: {pair.name}")
        with pair.active():
            turns = _converse(pair)
        rows += [
            [pair.name, number + 1, turn.prompt_tokens, f"{turn.to_decode / 1e6:.1f}", f"{turn.to_prefill / 1e6:.1f}",
             f"{turn.new_bytes / 1e6:.1f}", turn.computed, turn.new_tokens]
            for number, turn in enumerate(turns)
        ]  # fmt: skip
        judge(pair.name, turns, report, crosses=len(set(pair.daemons)) == 2)
    report.figures["chat"] = rows
    table("A chat of eight turns", ("pair", "turn", "prompt", "MB to decode", "MB to prefill", "MB not whole before",
          "computed by prefill", "tokens not whole before"), rows)  # fmt: skip


def _converse(pair: PdxPair) -> list[Turn]:
    source, target = pair.tools()
    prompt, turns, whole = prompt_of(FIRST_TOKENS, 77), [], 0
    for number in range(TURNS):
        before = [_put(source), _put(target), _computed(pair)]
        body = completion(pair.model, prompt, ANSWER_TOKENS, return_token_ids=True)
        timing = stream(pair.url, body, ANSWER_S)
        answer = [token for event in timing.events for choice in event["choices"] for token in choice["token_ids"]]
        if not timing.good or len(answer) != ANSWER_TOKENS:
            raise PdxError(f"{pair.name}, turn {number + 1}: {timing.status} {timing.error}, {len(answer)} tokens")
        if not unleased(source, target):
            raise PdxError(f"{pair.name}, turn {number + 1}: something does not end")
        after = [_put(source), _put(target), _computed(pair)]
        to_decode, to_prefill, computed = (b - a for a, b in zip(before, after, strict=True))
        paired = "x-pdx-prefill" in timing.headers
        turns.append(Turn(len(prompt), whole, to_decode, to_prefill, computed, paired))
        # The answer's last token was shown, not computed: no engine has its KV.
        whole = (len(prompt) + ANSWER_TOKENS - 1) // BLOCK_TOKENS
        prompt = [*prompt, *answer, *prompt_of(TURN_TOKENS, 78 + number)]
    if pair.daemons[0] == pair.daemons[1]:  # one daemon was counted twice
        turns = [replace(turn, to_prefill=0) for turn in turns]
    return turns


def judge(name: str, conversation: Sequence[Turn], report: Report, *, crosses: bool) -> None:
    """`crosses`: the two engines have a host each."""
    first, *turns = conversation
    report.equal(f"chat, {name}: turns that went through the pair", sum(t.paired for t in conversation),
                 len(conversation))  # fmt: skip
    report.equal(f"chat, {name}: tokens that prefill computed in the first turn", first.computed, first.prompt_tokens)
    least = min(turn.computed for turn in turns)
    report.bar(f"chat, {name}: tokens that prefill computed in a later turn, at least", least, f">= {TURN_TOKENS}",
               least >= TURN_TOKENS)  # fmt: skip
    if crosses:
        sent = min(turn.to_decode for turn in conversation)
        report.bar(f"chat, {name}: bytes to decode in a turn, at least", sent, f">= {NEW_BYTES}", sent >= NEW_BYTES)
    ways = {"to decode": [turn.to_decode for turn in turns], "to prefill": [turn.to_prefill for turn in turns]}
    for direction, counted in ways.items():
        worst = max(sent / turn.new_bytes for sent, turn in zip(counted, turns, strict=True))
        report.bar(f"chat, {name}: bytes {direction}, of those of blocks not whole before", round(worst, 3),
                   f"<= {FACTOR}", worst <= FACTOR)  # fmt: skip
    again = max(turn.computed - turn.new_tokens for turn in turns)
    report.bar(f"chat, {name}: tokens that prefill computed again", max(again, 0), "0", again <= 0)


def _put(tool: DaemonClient) -> int:
    return int(stats(tool)["counters"].get("bytes_put", 0))


def _computed(pair: PdxPair) -> int:
    """Prompt tokens that the prefill engine has computed so far."""
    return scraped(f"{pair.prefill.url}/metrics", "vllm:prompt_tokens_by_source_total", 'source="local_compute"')
