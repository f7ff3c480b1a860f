from __future__ import annotations

from pdx.tiers.cost import CostModel, Rate

MIB = 1 << 20


def model(*, tokens_per_s: float, bytes_per_s: float) -> CostModel:
    costs = CostModel(tried_every=10)
    costs.computed(1000, seconds=1000 / tokens_per_s, now=0.0)
    costs.loaded(MIB, seconds=MIB / bytes_per_s, now=0.0)
    return costs


def test_what_is_not_measured_is_loaded() -> None:
    costs = CostModel()
    assert costs.judge(tokens=1, size_bytes=1 << 40).load
    costs.computed(1000, seconds=0.001, now=0.0)
    assert costs.judge(tokens=1, size_bytes=1 << 40).load
    assert (costs.loads, costs.skips) == (2, 0)


def test_the_faster_way_is_chosen() -> None:
    costs = model(tokens_per_s=1000, bytes_per_s=100 * MIB)
    quick = costs.judge(tokens=100, size_bytes=5 * MIB)
    slow = costs.judge(tokens=100, size_bytes=20 * MIB)
    assert (quick.load, round(quick.load_s or 0, 6), round(quick.compute_s or 0, 6)) == (True, 0.05, 0.1)
    assert (slow.load, round(slow.load_s or 0, 6)) == (False, 0.2)
    assert not costs.judge(tokens=100, size_bytes=5 * MIB, queued_bytes=6 * MIB).load
    assert (costs.loads, costs.skips) == (1, 2)


def test_a_tier_that_was_slow_is_tried_again_and_forgiven() -> None:
    costs = model(tokens_per_s=1000, bytes_per_s=MIB)
    verdicts = [costs.judge(tokens=100, size_bytes=MIB).load for _ in range(20)]
    assert [index for index, load in enumerate(verdicts) if load] == [9, 19]
    assert costs.tries == 2
    for second in range(300, 310):
        costs.loaded(MIB, seconds=0.001, now=float(second))
    assert costs.judge(tokens=100, size_bytes=MIB).load


def test_old_measurements_count_less() -> None:
    rate = Rate(half_life_s=10)
    rate.measured(100, seconds=1, now=0.0)
    rate.measured(300, seconds=1, now=10.0)
    assert rate.per_s == (50 + 300) / 1.5
    rate.measured(0, seconds=0, now=10_000.0)
    assert rate.per_s is None or rate.per_s > 0
