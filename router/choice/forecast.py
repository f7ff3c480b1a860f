"""When a pair, or an engine alone, would have computed a request's first token: the model behind the policy "prefix".

    wait       what was sent to that engine and has not been answered yet, in seconds of its own pace
    compute    tokens of which its daemon has no KV / its pace
    exposed    bytes that the decode side lacks / pace of the link, beyond what computing hides: layers travel as they
               are computed
    decode     requests in flight there, each of which makes a first step later

Computing weighs more than waiting (`COMPUTE_WEIGHT`): who has a prompt's prefix keeps its requests until its line is
longer than what others would compute twice, because what is computed twice is missing somewhere else. That is "sticky
until saturated", with a saturation that is measured.

Pace that nobody has told or measured is NOMINAL: engines of one kind have one, so their order is right all the same.
A link that nobody has measured hides everything: to use it is to measure it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

if TYPE_CHECKING:
    from pdx.router.choice.policy import Candidate, Pair
    from pdx.router.choice.prompt import Prompt

T = TypeVar("T")

COMPUTE_WEIGHT = 2.0
NOMINAL_TOKENS_PER_S = 5_000.0
HANDOFF_S = 0.01  # what a handoff takes when nothing else does: two requests, RESERVE, GRANT and COMMIT
BRING_S = 0.1  # a wish, a handoff between daemons, and their word that it has come
BRING_MAX_S = 5.0  # half of what daemons give such a transfer; whoever waits for it waits for twice what is predicted
# Forecasts this close are one: the others' turn comes, and the pace's noise decides nothing.
ALIKE_S = 0.001


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds."""

    wait_s: float
    compute_s: float
    exposed_s: float = 0.0
    decode_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.compute_s + self.exposed_s + self.decode_s

    @property
    def cost_s(self) -> float:
        return self.ttft_s + (COMPUTE_WEIGHT - 1.0) * self.compute_s


class Bring(msgspec.Struct, frozen=True):
    """Leading blocks of a prompt that had better come from elsewhere than be computed."""

    source: Candidate  # an engine of the host that has them
    target: Candidate
    blocks: int
    seconds: float  # which that is predicted to take


def of_pair(prefill: Candidate, decode: Candidate, prompt: Prompt | None) -> Forecast:
    pace = prefill.tokens_per_s or NOMINAL_TOKENS_PER_S
    compute_s = prompt.work_tokens(prefill) / pace if prompt is not None else 0.0
    return Forecast(
        wait_s=prefill.ahead_s,
        compute_s=compute_s,
        exposed_s=_exposed_s(prefill, decode, prompt, compute_s),
        decode_s=decode.load * decode.step_s,
    )


def of_one(engine: Candidate, prompt: Prompt | None, *, pace: float = 0.0) -> Forecast:
    """`pace`: where its own is not known."""
    pace = engine.tokens_per_s or pace or NOMINAL_TOKENS_PER_S
    compute_s = prompt.work_tokens(engine) / pace if prompt is not None else 0.0
    return Forecast(wait_s=engine.ahead_s, compute_s=compute_s, decode_s=engine.load * engine.step_s)


def best_pair(
    offers: Sequence[tuple[Candidate, Sequence[Candidate]]], prompt: Prompt | None, turn: int
) -> tuple[Candidate, Candidate]:
    """Of prefill engines and the decode engines that fit each, the pair with the least cost; of those alike, in turns.

    There is at least one. What belongs to one side is worked out once: of 16 engines on either, there are 256 pairs.
    """
    decode_s: dict[str, float] = {}
    lacks: dict[str, float] = {}  # bytes that each decode engine's daemon would have to get
    pairs, costs = [], []
    for prefill, decodes in offers:
        alone, links, here = of_one(prefill, prompt), prefill.links, prefill.daemon.daemon_id
        cost_s = alone.wait_s + COMPUTE_WEIGHT * alone.compute_s
        for decode in decodes:
            name, there = decode.engine_id, decode.daemon.daemon_id
            if name not in decode_s:
                decode_s[name], lacks[name] = decode.load * decode.step_s, _lacking_bytes(decode, prompt)
            bytes_per_s = links.get(there) if here != there else None
            exposed_s = max(0.0, lacks[name] / bytes_per_s - alone.compute_s) if bytes_per_s else 0.0
            pairs.append((prefill, decode))
            costs.append(cost_s + decode_s[name] + exposed_s)
    return _least(pairs, costs, turn)


def best_alone(engines: Sequence[Candidate], prompt: Prompt | None, turn: int) -> Candidate:
    return _least(engines, [of_one(engine, prompt).cost_s for engine in engines], turn)


def better_alone(pair: Pair, engines: Iterable[Candidate], prompt: Prompt) -> tuple[Candidate, str] | None:
    """One of these that had better serve the request by itself than the pair, and why.

    Computing a prompt where others decode holds them up: it is better only if it gains more than they lose, the one
    who is to come next among them. Only paces that engines have told count here.
    """
    told = pair.prefill.told_tokens_per_s
    if not told:
        return None
    paired = of_pair(pair.prefill, pair.decode, prompt)
    best, gain_s = None, 0.0
    for engine in engines:
        alone = of_one(engine, prompt, pace=told)
        gained = paired.ttft_s + HANDOFF_S - alone.ttft_s - alone.compute_s * (engine.in_flight + 1)
        if gained > gain_s:
            best, gain_s = engine, gained
    if best is None:
        return None
    slow = {"short_prompt": HANDOFF_S, "prefill_saturated": paired.wait_s, "slow_link": paired.exposed_s}
    return best, max(slow, key=lambda reason: slow[reason])


def worth_bringing(target: Candidate, engines: Iterable[Candidate], prompt: Prompt) -> Bring | None:
    """What the engine that is to compute the prompt should get first, or None.

    Blocks come out of memories only, over links whose pace was told, to engines whose pace was told, and for prompts
    that save more than `BRING_S` by it.
    """
    if not target.told_tokens_per_s:
        return None
    here, best, saved_s = prompt.found_at(target).blocks, None, BRING_S
    content, token_bytes = target.info.content, _token_bytes(target)
    for engine in engines:
        # Hosts that never sent to each other have sent to others: as slow as the slowest, until this one is measured.
        bytes_per_s = engine.links.get(target.daemon.daemon_id) or min(engine.links.values(), default=0.0)
        blocks = prompt.found_at(engine).kept_blocks
        if engine.space != target.space or not bytes_per_s:
            continue
        tokens = (blocks - here) * content.block_tokens
        seconds = tokens * token_bytes / bytes_per_s
        if seconds > BRING_MAX_S:
            continue
        saves_s = tokens / target.told_tokens_per_s - seconds
        if saves_s > saved_s:
            best, saved_s = Bring(engine, target, blocks, seconds), saves_s
    return best


def _exposed_s(prefill: Candidate, decode: Candidate, prompt: Prompt | None, compute_s: float) -> float:
    bytes_per_s = prefill.links.get(decode.daemon.daemon_id)
    if not bytes_per_s or prefill.daemon.daemon_id == decode.daemon.daemon_id:
        return 0.0
    return max(0.0, _lacking_bytes(decode, prompt) / bytes_per_s - compute_s)


def _lacking_bytes(decode: Candidate, prompt: Prompt | None) -> float:
    if prompt is None:
        return 0.0
    return (prompt.tokens - prompt.cached_tokens(decode)) * _token_bytes(decode)


def _token_bytes(engine: Candidate) -> float:
    layout = engine.info.layout
    return layout.layers * layout.page_bytes * layout.ranks / layout.block_tokens


def _least(things: Sequence[T], costs: Sequence[float], turn: int) -> T:
    enough = min(costs) + ALIKE_S
    alike = [thing for thing, cost in zip(things, costs, strict=True) if cost <= enough]
    return alike[turn % len(alike)]
