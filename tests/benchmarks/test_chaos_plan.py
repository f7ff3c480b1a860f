"""What chaos draws from its seed: the same again, every kind in its share, and never the last engine by accident."""

from __future__ import annotations

from collections import Counter

from benchmarks.chaos.plan import (
    CLIENT,
    DAEMONS,
    DECODES,
    ENGINES,
    PHASES,
    PREFILLS,
    ROUTER,
    SHARES,
    Fault,
    faults,
    next_fault,
    wish,
)
from benchmarks.chaos.questions import COMPLETIONS, TOKENS_MIN, Known, Question

POOL = [
    Known(Question(COMPLETIONS, "short"), [" a", ""], True, 1),
    Known(Question(COMPLETIONS, "long"), [" a"] * 20, False, 9),
]


def test_the_same_seed_draws_the_same() -> None:
    assert faults(50, seed=7) == faults(50, seed=7) != faults(50, seed=8)
    assert [wish(n, seed=7, pool=POOL) for n in range(20)] == [wish(n, seed=7, pool=POOL) for n in range(20)]


def test_every_share_is_kept() -> None:
    assert sum(share for _, _, share in SHARES) == 100
    drawn = faults(200, seed=1)
    assert [fault.number for fault in drawn] == list(range(200))
    counts = Counter((fault.kind, fault.target) for fault in drawn)
    for kind, targets, share in SHARES:
        of_kind = [counts[kind, target] for target in targets]
        assert sum(of_kind) == 2 * share
        assert min(of_kind) > 0


def test_two_hundred_faults_meet_every_part_in_every_phase() -> None:
    met = {(fault.target, fault.phase) for fault in faults(200, seed=1) if fault.kind in ("kill", "stop")}
    assert met >= {(target, phase) for target in (*ENGINES, *DAEMONS, ROUTER) for phase in PHASES}


def test_a_victim_is_well_and_not_the_last_of_its_role() -> None:
    kill_p0 = Fault(0, "kill", "P0", "any", 1.0)
    stop_d0 = Fault(1, "stop", "D0", "any", 1.0)
    leave = Fault(2, "leave", CLIENT, "any", 0.0)
    waiting = [kill_p0, stop_d0, leave]
    assert next_fault(waiting, unwell=frozenset()) == kill_p0
    assert next_fault(waiting, unwell=frozenset(DECODES)) == kill_p0
    assert next_fault(waiting, unwell=frozenset({"P1"})) == stop_d0
    assert next_fault(waiting, unwell=frozenset({"P1", "D0"})) == leave
    assert next_fault(waiting[:2], unwell=frozenset({"P1", "D0"})) is None


def test_a_whole_role_dies_only_when_all_engines_are_well() -> None:
    kill_all = Fault(0, "kill", "prefill", "any", 1.0)
    assert next_fault([kill_all], unwell=frozenset({ROUTER})) == kill_all
    for name in (*PREFILLS, *DECODES):
        assert next_fault([kill_all], unwell=frozenset({name})) is None


def test_a_wish_asks_for_no_more_than_is_known() -> None:
    for number in range(200):
        drawn = wish(number, seed=5, pool=POOL)
        known = POOL[drawn.question]
        assert min(TOKENS_MIN, known.tokens) <= drawn.max_tokens <= known.tokens
