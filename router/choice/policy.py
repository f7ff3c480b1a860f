"""Which engines serve a request. Pure functions on a frozen snapshot; knows nothing of sockets, clocks or requests.

A pair needs two engines of one model, one content and one layout, whose daemons both answer, and of which at least
one was started for its side: two engines of role "both" have nothing to gain from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from pdx.router.choice import forecast
from pdx.router.choice.prompt import Prompt
from pdx.router.choice.spread import Choice, affinity, least_loaded, power_of_two, round_robin
from pdx.wire import DaemonRef, EngineInfo

PolicyName = Literal["prefix", "round_robin", "least_loaded", "power_of_two", "affinity"]
Side = Literal["prefill", "decode"]

NO_LIMIT = 1 << 30  # no line is as long: aiohttp would have run out of sockets


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A routable engine, as the directory and the router's own counts see it at one moment."""

    info: EngineInfo
    daemon: DaemonRef
    pairable: bool = True  # its daemon answers
    # Requests queued in the engine, as announced: decode's line. (Those in flight may be running, and run for long.)
    waiting: int = 0
    in_flight: int = 0  # requests that this router has under way there
    in_line: int = 0  # those of them from which nothing has come yet: prefill's line, known at once
    avoid: frozenset[str] = frozenset()  # daemons to which its daemon has failed to hand over, again and again
    space: bytes = b""  # keys.space_of its blocks
    told_tokens_per_s: float = 0.0  # at which it computes prompts, as it says itself; 0: it has not
    tokens_per_s: float = 0.0  # the same, or as learned from its answers; 0: neither
    ahead_s: float = 0.0  # until it has computed what this router has sent to it
    step_s: float = 0.0  # by which a request in flight there delays the first step of the next
    links: Mapping[str, float] = {}  # daemon id -> bytes a second at which its own daemon's puts arrive there

    @property
    def engine_id(self) -> str:
        return self.info.engine_id

    @property
    def load(self) -> int:
        return self.waiting + self.in_flight

    @property
    def wait_s(self) -> float:
        """How long something that comes now is predicted to lie there until its turn."""
        return self.ahead_s + self.load * self.step_s


class Pair(msgspec.Struct, frozen=True):
    prefill: Candidate
    decode: Candidate


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What policies may know of a request, and the chance that they may take."""

    draws: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # uniform in [0, 1)
    session: str = ""  # whose requests had better meet the same engines; empty: none
    prompt: Prompt | None = None


Snapshot = tuple[Candidate, ...]
Policy = Callable[[Sequence[Candidate], Choice], Candidate]

NOTHING_ASKED = Asked()
# The policy "prefix" chooses pairs as a whole: see `forecast`.
POLICIES: Mapping[PolicyName, Policy] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "affinity": affinity,
}


def choose_pair(
    snapshot: Snapshot,
    model: str,
    *,
    policy: PolicyName,
    turn: int,
    line_max: int = NO_LIMIT,
    asked: Asked = NOTHING_ASKED,
) -> Pair | None:
    """A prefill engine and a decode engine that fits it, both with lines shorter than `line_max`, or None."""
    decodes = [c for c in serving(snapshot, model, "decode") if c.waiting < line_max]
    candidates = [c for c in serving(snapshot, model, "prefill") if c.in_line < line_max]
    offers = _offers(candidates, decodes, model)
    if not offers:
        return None
    if policy == "prefix":
        return Pair(*forecast.best_pair(offers, asked.prompt, turn))
    choose, session, partners = POLICIES[policy], asked.session, {p.engine_id: fitting for p, fitting in offers}
    prefill = choose([p for p, _ in offers], Choice(turn, asked.draws[:2], session))
    # Decode takes its turns by round of prefill, shifted within the round: every pair meets, whatever the two numbers.
    rounds, place = divmod(turn, len(offers))
    return Pair(prefill, choose(partners[prefill.engine_id], Choice(rounds + place, asked.draws[2:], session)))


def choose_alone(
    snapshot: Snapshot,
    model: str,
    *,
    policy: PolicyName,
    turn: int,
    line_max: int = NO_LIMIT,
    exclude: frozenset[str] = frozenset(),
    asked: Asked = NOTHING_ASKED,
) -> Candidate | None:
    """One engine that serves a whole request and whose line is shorter than `line_max`, or None."""
    candidates = [c for c in serving(snapshot, model, "decode") if c.engine_id not in exclude and c.waiting < line_max]
    if not candidates:
        return None
    if policy == "prefix":
        return forecast.best_alone(candidates, asked.prompt, turn)
    return POLICIES[policy](candidates, Choice(turn, asked.draws[2:], asked.session))


def choose_instead(
    pair: Pair, snapshot: Snapshot, model: str, *, policy: PolicyName, line_max: int = NO_LIMIT, asked: Asked
) -> tuple[Candidate, str] | None:
    """An engine that had better serve the request whole than this pair, and the reason; only by the policy "prefix"."""
    if policy != "prefix" or asked.prompt is None:
        return None
    candidates = [c for c in serving(snapshot, model, "decode") if c.waiting < line_max]
    return forecast.better_alone(pair, candidates, asked.prompt)


def _offers(
    prefills: Sequence[Candidate], decodes: Sequence[Candidate], model: str
) -> list[tuple[Candidate, Sequence[Candidate]]]:
    """Each prefill engine that some decode engines fit, with these.

    Of 16 and 16 there are 256 pairs, and a request has no time to look at each: engines of one kind fit alike.
    """
    kinds: dict[tuple[bytes, bool, str | None], list[Candidate]] = {}
    for decode in decodes:
        if decode.pairable:
            kinds.setdefault(_kind(decode, model), []).append(decode)
    offers: list[tuple[Candidate, Sequence[Candidate]]] = []
    for prefill in prefills:
        alike_ones = kinds.get(_kind(prefill, model), [])
        all_fit = prefill.space and prefill.pairable and not prefill.avoid and prefill.info.role == "prefill"
        fitting = alike_ones if all_fit else [decode for decode in alike_ones if fit(prefill, decode, model)]
        if fitting:
            offers.append((prefill, fitting))
    return offers


def serving(snapshot: Snapshot, model: str, side: Side) -> list[Candidate]:
    """The engines of this model for this side, in a stable order."""
    fitting = [c for c in snapshot if model in c.info.models and c.info.role in (side, "both")]
    return sorted(fitting, key=lambda candidate: candidate.engine_id)


def same_server(one: EngineInfo, other: EngineInfo) -> bool:
    """Whether both are data-parallel ranks behind one HTTP server: they can be reached, or not, together."""
    return one.url == other.url and one.data_parallel_rank is not None


def alike(one: Candidate, other: Candidate, model: str) -> bool:
    """Whether both compute the same under this name: the same weights, and the same adapter if it is one."""
    return one.info.content == other.info.content and one.info.adapters.get(model) == other.info.adapters.get(model)


def unfit(snapshot: Snapshot, tried: Sequence[Candidate], model: str, *, like: Candidate | None) -> frozenset[str]:
    """Who can't repeat what `tried` have failed: they themselves, all behind their servers, and who is not `like`."""
    behind = {c.engine_id for c in snapshot for each in tried if same_server(c.info, each.info)}
    strangers = {c.engine_id for c in snapshot if like is not None and not alike(c, like, model)}
    return frozenset(behind | strangers | {each.engine_id for each in tried})


def _kind(engine: Candidate, model: str) -> tuple[bytes, bool, str | None]:
    """What engines of a pair have in common."""
    return engine.space, engine.info.shares_blocks, engine.info.adapters.get(model)


def fit(prefill: Candidate, decode: Candidate, model: str) -> bool:
    """Whether KV that the one computes for this model can be read by the other."""
    if prefill.engine_id == decode.engine_id or not (prefill.pairable and decode.pairable):
        return False
    if decode.daemon.daemon_id in prefill.avoid:
        return False
    if prefill.info.role == "both" and decode.info.role == "both":
        return False
    if prefill.info.shares_blocks != decode.info.shares_blocks:
        return False
    if prefill.space and prefill.space == decode.space:  # it names content and layout, and is sooner compared
        return prefill.info.adapters.get(model) == decode.info.adapters.get(model)
    return alike(prefill, decode, model) and prefill.info.layout == decode.info.layout
