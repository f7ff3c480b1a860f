"""One engine of several: shares, sessions, and what a bound on load does to them."""

from __future__ import annotations

import random
from collections import Counter

from engine_fakes import daemon_ref, engine_info
from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.router.choice.policy import Candidate
from pdx.router.choice.spread import Choice, affinity, power_of_two


def engines(*loads: int) -> list[Candidate]:
    return [
        Candidate(info=engine_info(f"e{n}", "decode"), daemon=daemon_ref(), in_flight=load)
        for n, load in enumerate(loads)
    ]


DRAWS = st.floats(0, 1, exclude_max=True)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=9), DRAWS, DRAWS)
def test_power_of_two_never_takes_the_most_loaded_alone(loads: list[int], first: float, second: float) -> None:
    chosen = power_of_two(engines(*loads), Choice(0, (first, second)))
    assert sum(load >= chosen.load for load in loads) >= 2, "it was the less loaded of two different ones"


def test_power_of_two_of_one() -> None:
    (only,) = engines(3)
    assert power_of_two([only], Choice(0, (0.9, 0.9))) == only


def test_power_of_two_draws_every_pair_alike() -> None:
    rng, equals = random.Random(1), engines(0, 0, 0, 0)
    counts = Counter(power_of_two(equals, Choice(0, (rng.random(), rng.random()))).engine_id for _ in range(4000))
    assert set(counts) == {"e0", "e1", "e2", "e3"}
    assert max(counts.values()) < 1.2 * min(counts.values())


@settings(max_examples=30)
@given(st.text(min_size=1), st.integers(2, 8))
def test_a_session_comes_back_whatever_engines_leave_but_its_own(session: str, count: int) -> None:
    idle = engines(*[0] * count)
    home = affinity(idle, Choice(0, session=session))
    for other in idle:
        left = [engine for engine in idle if engine != other]
        stays = affinity(left, Choice(1, session=session))
        assert stays == home if other != home else stays != home


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.text(min_size=1))
def test_a_session_leaves_an_engine_that_has_more_than_its_share(loads: list[int], session: str) -> None:
    chosen = affinity(engines(*loads), Choice(0, session=session))
    assert chosen.load <= 1.25 * (sum(loads) + 1) / len(loads)


def test_a_session_may_be_called_by_any_bytes() -> None:
    """aiohttp's headers have those that are no UTF-8 as lone surrogates."""
    idle = engines(0, 0)
    assert affinity(idle, Choice(0, session="Ren\udce9")) == affinity(idle, Choice(1, session="Ren\udce9"))


def test_sessions_spread_and_those_without_go_to_the_least_loaded() -> None:
    idle = engines(0, 0, 0, 0)
    counts = Counter(affinity(idle, Choice(0, session=f"s{n}")).engine_id for n in range(800))
    assert min(counts.values()) > 140
    assert affinity(engines(2, 0, 1), Choice(5)).engine_id == "e1"
