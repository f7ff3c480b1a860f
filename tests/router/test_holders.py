"""A table of who has what, against a plain dictionary."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.router.choice.holders import NOBODY, Held, Holders

NAMES = st.integers(0, 40).map(lambda n: n * 1024 % (1 << 64))  # all in one shard, 0 among them
PUTS = st.tuples(NAMES, st.integers(0, 3), st.booleans(), st.booleans())
STEPS = st.lists(PUTS | st.integers(0, 3), max_size=200)


@settings(max_examples=60)
@given(STEPS)
def test_it_is_a_dictionary_of_sets(steps: list[tuple[int, int, bool, bool] | int]) -> None:
    """A step is a put, or a holder that leaves."""
    holders, truth = Holders(names_max=1000), {}
    for step in steps:
        if isinstance(step, int):
            holders.leave(step)
            truth = {name: {h: tiers for h, tiers in held.items() if h != step} for name, held in truth.items()}
            continue
        name, holder, arena, disk = step
        assert holders.put(name, holder, arena=arena, disk=disk)
        truth.setdefault(name, {})[holder] = (arena, disk)
    holders.check_integrity()
    names = [n * 1024 for n in range(41)]
    expected = [
        Held(
            sum(1 << h for h, (arena, _) in truth.get(name, {}).items() if arena),
            sum(1 << h for h, (_, disk) in truth.get(name, {}).items() if disk),
        )
        for name in names
    ]
    assert list(holders.of(names)) == expected
    assert len(holders) == sum(held != NOBODY for held in expected)


def test_a_full_table_remembers_what_it_has_and_takes_more_when_holders_have_left() -> None:
    holders = Holders(names_max=64)
    assert all(holders.put(name, 0, arena=True, disk=False) for name in range(1, 65))
    assert not holders.put(65, 0, arena=True, disk=False)
    assert holders.put(64, 1, arena=True, disk=False), "it is there already"
    assert list(holders.of([64, 65])) == [Held(arena=3), NOBODY]
    holders.leave(0)
    assert len(holders) == 1
    assert all(holders.put(name, 1, arena=False, disk=True) for name in range(100, 163))
    assert not holders.put(163, 1, arena=False, disk=True)
    holders.check_integrity()


def test_sets_are_shared_and_their_numbers_are_used_again() -> None:
    """The table must not grow with how often blocks come and go."""
    holders = Holders(names_max=1000)
    for turn in range(50):
        for name in range(1, 20):
            holders.put(name, turn % 7, arena=True, disk=False)
        for name in range(1, 20):
            holders.put(name, turn % 7, arena=False, disk=False)
        if turn % 5 == 0:
            holders.leave(turn % 7)
    holders.check_integrity()
    assert len(holders) == 0
    assert len(holders._sets) < 20
