"""The cost model: who would have the first token soonest, and when no pair is worth its while."""

from __future__ import annotations

import msgspec
import pytest
from engine_fakes import LAYOUT, daemon_ref, engine_info
from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.router.choice.forecast import COMPUTE_WEIGHT, HANDOFF_S, better_alone, of_pair
from pdx.router.choice.knowledge import Found
from pdx.router.choice.policy import Asked, Candidate, Pair, choose_alone, choose_instead, choose_pair
from pdx.router.choice.prompt import Prompt
from pdx.wire import Role

SPACE = b"s"
TOKEN_BYTES = LAYOUT.layers * LAYOUT.page_bytes // LAYOUT.block_tokens


def candidate(name: str, role: Role, **seen: object) -> Candidate:
    """Each on a host of its own; a thousand tokens a second."""
    given = {"space": SPACE, "told_tokens_per_s": 1000.0, "tokens_per_s": 1000.0, **seen}
    return Candidate(info=engine_info(name, role), daemon=daemon_ref(name), **given)  # type: ignore[arg-type]


def prompt(tokens: int, **blocks: int | Found) -> Prompt:
    found = {name: b if isinstance(b, Found) else Found(b, b) for name, b in blocks.items()}
    return Prompt(tokens=tokens, found={SPACE: found})


def chosen(*engines: Candidate, prompt: Prompt | None, turn: int = 0) -> tuple[str, str]:
    pair = choose_pair(engines, "smol", policy="prefix", turn=turn, asked=Asked(prompt=prompt))
    assert pair is not None
    return pair.prefill.engine_id, pair.decode.engine_id


P0, P1, D0 = candidate("p0", "prefill"), candidate("p1", "prefill"), candidate("d0", "decode")


def busy(engine: Candidate, **seen: object) -> Candidate:
    return msgspec.structs.replace(engine, **seen)


def test_the_holder_gets_it_until_its_line_is_too_long() -> None:
    """It saves 3.2 s of computing, which weighs twice."""
    asked = prompt(4000, p1=200)
    for turn in range(4):
        assert chosen(P0, P1, D0, prompt=asked, turn=turn) == ("p1", "d0")
        assert chosen(P0, busy(P1, ahead_s=6.3), D0, prompt=asked, turn=turn) == ("p1", "d0")
        assert chosen(P0, busy(P1, ahead_s=6.5), D0, prompt=asked, turn=turn) == ("p0", "d0")


def test_blocks_on_a_disk_count_less_than_those_in_memory() -> None:
    assert chosen(P0, P1, D0, prompt=prompt(4000, p0=Found(200, 0), p1=200)) == ("p1", "d0")
    assert chosen(P0, P1, D0, prompt=prompt(4000, p0=Found(200, 0))) == ("p0", "d0")


def test_a_faster_engine_is_better_for_long_prompts_and_a_free_one_for_short_ones() -> None:
    slow, fast = P0, busy(P1, tokens_per_s=4000.0, ahead_s=0.5)
    assert chosen(slow, fast, D0, prompt=prompt(4000))[0] == "p1"
    assert chosen(slow, fast, D0, prompt=prompt(100))[0] == "p0"


def test_what_is_alike_is_taken_in_turns_so_that_nobody_herds() -> None:
    d1 = candidate("d1", "decode")
    assert {chosen(P0, P1, D0, d1, prompt=prompt(100), turn=turn) for turn in range(4)} == {
        (p, d) for p in ("p0", "p1") for d in ("d0", "d1")
    }
    assert len({chosen(P0, P1, D0, prompt=None, turn=turn) for turn in range(2)}) == 2


def test_a_slow_link_costs_what_computing_does_not_hide() -> None:
    """4,000 tokens take 4 s to compute. Over this link they take 10 s, and half of them 5 s."""
    slow = 4000 * TOKEN_BYTES / 10.0
    p0, d1 = busy(P0, links={"d0": slow, "d1": 1e12}), candidate("d1", "decode")
    assert of_pair(p0, D0, prompt(4000)).exposed_s == pytest.approx(6.0)
    assert of_pair(p0, D0, prompt(4000, d0=125)).exposed_s == pytest.approx(1.0)
    assert of_pair(p0, d1, prompt(4000)).exposed_s == 0.0
    assert of_pair(P0, D0, prompt(4000)).exposed_s == 0.0, "nobody has measured it yet"
    same_host = busy(D0, daemon=P0.daemon)
    assert of_pair(busy(P0, links={"p0": slow}), same_host, prompt(4000)).exposed_s == 0.0
    assert {chosen(p0, D0, d1, prompt=prompt(4000), turn=turn) for turn in range(4)} == {("p0", "d1")}


def test_decode_engines_are_chosen_by_their_load() -> None:
    d0, d1 = busy(D0, in_flight=9, step_s=0.01), busy(candidate("d1", "decode"), in_flight=2, step_s=0.01)
    assert {chosen(P0, d0, d1, prompt=prompt(100), turn=turn) for turn in range(4)} == {("p0", "d1")}
    asked = Asked(prompt=prompt(4000, d0=200))
    alone = choose_alone((d0, d1), "smol", policy="prefix", turn=0, asked=asked)
    assert alone is not None
    assert alone.engine_id == "d0", "it has the prompt, and would compute it alone"


@pytest.mark.parametrize(
    ("prefill", "decode", "asked", "reason"),
    [
        (P0, D0, prompt(4000), ""),
        (P0, D0, prompt(9), "short_prompt"),
        (P0, D0, prompt(11), ""),
        (P0, D0, prompt(4000, d0=249, p0=249), ""),
        (P0, D0, prompt(4000, d0=250, p0=250), "short_prompt"),
        (P0, busy(D0, in_flight=2), prompt(9), ""),
        (P0, busy(D0, in_flight=2), prompt(3), "short_prompt"),
        (busy(P0, ahead_s=20.0), D0, prompt(4000), "prefill_saturated"),
        (busy(P0, ahead_s=20.0), busy(D0, in_flight=5), prompt(4000), ""),
        (busy(P0, ahead_s=20.0), busy(D0, ahead_s=20.0), prompt(4000), ""),
        (busy(P0, links={"d0": TOKEN_BYTES * 400.0}), D0, prompt(4000), "slow_link"),
        (busy(P0, told_tokens_per_s=0.0, ahead_s=20.0), D0, prompt(4000), ""),
        (P0, busy(D0, tokens_per_s=0.0), prompt(9), "short_prompt"),
        (P0, busy(D0, tokens_per_s=100.0), prompt(9), ""),
    ],
)  # fmt: skip
def test_when_one_engine_alone_is_better(prefill: Candidate, decode: Candidate, asked: Prompt, reason: str) -> None:
    pair, snapshot = Pair(prefill, decode), (prefill, decode)
    better = choose_instead(pair, snapshot, "smol", policy="prefix", asked=Asked(prompt=asked))
    assert better == ((decode, reason) if reason else None)
    assert choose_instead(pair, snapshot, "smol", policy="round_robin", asked=Asked(prompt=asked)) is None
    full = msgspec.structs.replace(decode, waiting=3)
    limited = Asked(prompt=asked)
    assert choose_instead(pair, (prefill, full), "smol", policy="prefix", line_max=3, asked=limited) is None


SECONDS = st.floats(0, 30)
SEEN = st.tuples(SECONDS, st.floats(100, 1e5), st.integers(0, 400))


@settings(max_examples=60)
@given(st.lists(SEEN, min_size=1, max_size=5), st.integers(1, 6400), st.integers(0, 50))
def test_nobody_else_would_have_been_better(seen: list[tuple[float, float, int]], tokens: int, turn: int) -> None:
    engines = [
        candidate(f"p{n}", "prefill", ahead_s=ahead_s, tokens_per_s=pace) for n, (ahead_s, pace, _) in enumerate(seen)
    ]
    asked = prompt(tokens, **{f"p{n}": Found(blocks, blocks) for n, (_, _, blocks) in enumerate(seen) if blocks})
    name, _ = chosen(*engines, D0, prompt=asked, turn=turn)
    costs = {}
    for n, (ahead_s, pace, blocks) in enumerate(seen):
        uncached = tokens - min(16 * blocks, tokens - 1)
        costs[f"p{n}"] = ahead_s + COMPUTE_WEIGHT * uncached / pace
    assert costs[name] <= min(costs.values()) + 0.0011


@settings(max_examples=60)
@given(SECONDS, st.integers(1, 6400), st.integers(0, 9), SECONDS)
def test_alone_never_costs_the_others_more_than_it_gains(
    ahead_s: float, tokens: int, in_flight: int, decode_ahead_s: float
) -> None:
    pair = Pair(busy(P0, ahead_s=ahead_s), busy(D0, in_flight=in_flight, ahead_s=decode_ahead_s))
    compute_s = tokens / 1000.0
    gain_s = ahead_s + compute_s + HANDOFF_S - decode_ahead_s - compute_s
    better = better_alone(pair, [pair.decode], prompt(tokens))
    assert (better is not None) == (gain_s > compute_s * (in_flight + 1))
