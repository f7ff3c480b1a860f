from __future__ import annotations

import random
from collections.abc import Callable

from counted import growth
from hypothesis import given
from hypothesis import strategies as st

from pdx.buffer.evict import Lru, Policy
from pdx.buffer.s3fifo import GHOSTS_MIN, S3Fifo


def fifo() -> S3Fifo[str]:
    return S3Fifo(lambda name: name)


def use(policy: Policy[str], *names: str) -> None:
    for name in names:
        policy.removed(name)
        policy.touched([name])


def test_unused_items_go_in_the_order_they_came_and_chains_from_their_tail() -> None:
    policy = fifo()
    policy.touched(["head", "tail"])
    policy.touched(["next"])
    assert list(policy.victims()) == ["tail", "head", "next"]


def test_a_chain_that_grows_comes_anew_but_was_not_used() -> None:
    policy = fifo()
    for name in ("head", "middle", "else", "tail"):
        policy.touched([name])
    policy.grown(["head", "middle", "never seen"])
    assert list(policy.victims()) == ["else", "tail", "middle", "head"]
    use(policy, "else")
    assert list(policy.victims()) == ["tail", "middle", "head", "else"]


def test_what_was_used_again_outlives_what_came_later() -> None:
    policy = fifo()
    for name in ("shared", "once", "twice"):
        policy.touched([name])
    use(policy, "shared")
    assert list(policy.victims()) == ["once", "twice", "shared"]


def test_a_ghost_comes_back_into_the_main_queue() -> None:
    policy = fifo()
    policy.touched(["back"])
    policy.evicted("back")
    for name in ("back", "a", "b"):
        policy.touched([name])
    assert list(policy.victims()) == ["a", "b", "back"]


def test_an_item_in_use_is_no_victim_and_keeps_its_name() -> None:
    policy = fifo()
    for name in ("a", "b"):
        policy.touched([name])
    policy.removed("a")
    assert (list(policy.victims()), len(policy)) == (["b"], 1)
    policy.removed("a")
    policy.removed("never seen")
    policy.touched(["a"])
    assert (list(policy.victims()), len(policy)) == (["b", "a"], 2)


def test_used_items_age() -> None:
    """Main's items lose a chance with every round: what was popular once does not stay for ever."""
    policy = fifo()
    policy.touched(["old"])
    use(policy, "old", "old", "old", "old")
    for number in range(200):
        policy.touched([f"n{number}"])
        use(policy, f"n{number}")
        policy.evicted(next(policy.victims()))
        if "old" not in set(policy.victims()):
            return
    raise AssertionError("an item that nobody uses stayed for ever")


def test_who_asks_again_for_room_finds_what_it_found_at_once() -> None:
    """What was used goes round until its chances are over: hundreds of thousands, and everybody waits."""

    def second_look(items: int) -> Callable[[], object]:
        policy = fifo()
        names = [str(number) for number in range(items)]
        use(policy, *4 * names)
        first = next(policy.victims())

        def look() -> None:
            assert next(policy.victims()) == first

        return look

    assert growth(second_look) < 1.5


def test_who_only_looks_takes_nobodys_chances() -> None:
    policy = fifo()
    use(policy, "old", "old", "young")
    assert sorted(policy) == ["old", "young"]
    policy.removed("young")
    assert list(policy) == ["old"]
    policy.touched(["young", "new"])
    assert list(policy.victims()) == ["new", "old", "young"]


def test_ghosts_are_bounded() -> None:
    policy = fifo()
    for number in range(10 * GHOSTS_MIN):
        policy.touched([str(number)])
        policy.evicted(str(number))
    assert repr(policy) == f"<S3Fifo 0 idle: 0 small, 0 main, {GHOSTS_MIN} ghosts>"


def test_a_scan_does_not_wash_out_what_is_shared() -> None:
    """Zipf-distributed prompts with scans in between: S3-FIFO hits clearly more often than LRU."""
    rng = random.Random(42)
    names = [f"shared-{rank}" for rank in range(1000)]
    weights = [1 / (rank + 1) for rank in range(1000)]
    trace: list[str] = []
    for scan in range(20):
        trace += rng.choices(names, weights, k=500)
        trace += [f"scan-{scan}-{number}" for number in range(500)]
    assert hit_rate(trace, fifo(), room=100) > 1.15 * hit_rate(trace, Lru[str](), room=100)


def test_without_scans_it_is_no_worse_than_lru() -> None:
    rng = random.Random(43)
    trace = rng.choices([str(rank) for rank in range(1000)], [1 / (rank + 1) for rank in range(1000)], k=10_000)
    assert hit_rate(trace, fifo(), room=100) > hit_rate(trace, Lru[str](), room=100)


def hit_rate(trace: list[str], policy: Policy[str], *, room: int) -> float:
    kept: set[str] = set()
    hits = 0
    for name in trace:
        if name in kept:
            hits += 1
            policy.removed(name)
        elif len(kept) == room:
            victim = next(policy.victims())
            policy.evicted(victim)
            kept.remove(victim)
        kept.add(name)
        policy.touched([name])
    return hits / len(trace)


def test_what_is_forgotten_leaves_nothing_behind() -> None:
    """As a store that is cleared before it was ever full: nothing is evicted, and so nothing ages."""
    policy = fifo()
    for number in range(1000):
        use(policy, str(number))
        policy.forgotten(str(number))
    assert repr(policy) == "<S3Fifo 0 idle: 0 small, 0 main, 0 ghosts>"


CALLS = st.lists(
    st.tuples(st.sampled_from(["touched", "removed", "forgotten", "evicted"]), st.integers(0, 9)), max_size=60
)
MAKERS: tuple[Callable[[], Policy[str]], ...] = (fifo, Lru[str])


@given(calls=CALLS, maker=st.sampled_from(MAKERS))
def test_victims_are_exactly_the_idle_items(calls: list[tuple[str, int]], maker: Callable[[], Policy[str]]) -> None:
    policy, idle = maker(), set[str]()
    for call, number in calls:
        name = str(number)
        if call == "touched":
            policy.touched([name])
            idle.add(name)
        elif call == "removed":
            policy.removed(name)
            idle.discard(name)
        elif call == "forgotten":
            policy.forgotten(name)
            idle.discard(name)
        elif name in idle:
            policy.evicted(name)
            idle.discard(name)
        assert set(policy) == idle
        victims = list(policy.victims())
        assert len(victims) == len(set(victims)) == len(policy)
        assert set(victims) == idle
