from __future__ import annotations

import math

from benchmarks.harness.answers import Answer, at_once, compare

RIVALS = [{"a": -0.1, "b": -2.0}, {"c": -0.70, "d": -0.69}]


def test_equal_answers_do_not_part() -> None:
    assert compare(Answer(["a", "c"], RIVALS), Answer(["a", "c"], RIVALS)) is None


def test_the_first_difference_counts_with_both_sides_log_probs() -> None:
    parting = compare(Answer(["a", "c"], RIVALS), Answer(["a", "d"], [RIVALS[0], {"c": -0.8, "d": -0.6}]))
    assert parting is not None
    assert (parting.index, parting.left, parting.right) == (1, "c", "d")
    assert math.isclose(parting.nats, 0.01, abs_tol=1e-9)
    assert math.isclose(parting.nats_right, 0.2)


def test_a_token_that_is_no_rival_is_infinitely_far() -> None:
    parting = compare(Answer(["z"], [{"z": 0.0}]), Answer(["a"], RIVALS[:1]))
    assert parting is not None
    assert parting.nats == math.inf


def test_results_keep_their_order() -> None:
    assert at_once([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
