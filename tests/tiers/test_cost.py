from __future__ import annotations

from pdx.tiers.cost import CostModel, Verdict

MIB = 1 << 20


def model(*, bytes_per_s: float) -> CostModel:
    costs = CostModel(tried_every=10)
    costs.loaded(MIB, seconds=MIB / bytes_per_s, now=0.0)
    return costs


def judge(costs: CostModel, size_bytes: int, queued_bytes: int = 0) -> Verdict:
    """Of blocks that take 0.1 s to compute."""
    return costs.judge(tokens=100, tokens_per_s=1000, size_bytes=size_bytes, queued_bytes=queued_bytes)


def test_what_is_not_measured_is_loaded() -> None:
    costs = CostModel()
    assert costs.judge(tokens=1, tokens_per_s=0, size_bytes=1 << 40).load
    assert costs.judge(tokens=1, tokens_per_s=1e6, size_bytes=1 << 40).load
    costs.loaded(1, seconds=1, now=0.0)
    assert costs.judge(tokens=1, tokens_per_s=0, size_bytes=1 << 40).load
    assert (costs.loads, costs.skips) == (3, 0)


def test_the_faster_way_is_chosen() -> None:
    costs = model(bytes_per_s=100 * MIB)
    quick, slow = judge(costs, 5 * MIB), judge(costs, 20 * MIB)
    assert (quick.load, round(quick.load_s or 0, 6), round(quick.compute_s or 0, 6)) == (True, 0.05, 0.1)
    assert (slow.load, round(slow.load_s or 0, 6)) == (False, 0.2)
    assert not judge(costs, 5 * MIB, queued_bytes=6 * MIB).load
    assert (costs.loads, costs.skips) == (1, 2)


def test_a_tier_that_was_slow_is_tried_again_and_forgiven() -> None:
    costs = model(bytes_per_s=MIB)
    verdicts = [judge(costs, MIB) for _ in range(20)]
    assert [index for index, verdict in enumerate(verdicts) if verdict.load] == [9, 19]
    assert [index for index, verdict in enumerate(verdicts) if verdict.tried] == [9, 19]
    assert costs.tries == 2
    for second in range(300, 310):
        costs.loaded(MIB, seconds=0.001, now=float(second))
    assert judge(costs, MIB).load
