"""SendPlan and LoadPlan: every page exactly once, whatever the engine does in between."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.engine.plan import LOOK_AHEAD, NO_BLOCK, WINDOW, LoadPlan, SendPlan, fits, promised_tokens
from pdx.errors import Refused
from pdx.layout import CONTROL_BYTES, PageLayout, Place, blocks_for


def place(index: int) -> Place:
    return Place(8192 + index * 4096, 1, 0, 4096 + index * 64, 1)


def send_plan(prompt_tokens: int, block_tokens: int, held: frozenset[int] = frozenset()) -> SendPlan:
    blocks = blocks_for(prompt_tokens, block_tokens)
    places = [None if n in held else place(n) for n in range(blocks)]
    return SendPlan(places, prompt_tokens=prompt_tokens, block_tokens=block_tokens)


@pytest.mark.parametrize("prompt_tokens", range(1, 10))
@pytest.mark.parametrize("block_tokens", [1, 2, 3, 4])
def test_every_chunking_saves_each_block_once_and_as_soon_as_it_is_whole(prompt_tokens: int, block_tokens: int) -> None:
    blocks = blocks_for(prompt_tokens, block_tokens)
    ids = list(range(100, 100 + blocks))
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, prompt_tokens), n) for n in range(prompt_tokens)
    ):
        plan = send_plan(prompt_tokens, block_tokens)
        saved: list[int] = []
        for tokens_after in [*cuts, prompt_tokens]:
            # The engine has allocated no more blocks than it needs for this step.
            due = plan.step([ids[: blocks_for(tokens_after, block_tokens)]], tokens_after=tokens_after)
            saved += [index for index, _, _ in due]
            assert all(block_ids == (ids[index],) and at == place(index) for index, block_ids, at in due)
            whole = blocks if tokens_after == prompt_tokens else tokens_after // block_tokens
            assert saved == list(range(whole))
        assert plan.complete


@settings(max_examples=150, deadline=None)
@given(
    block_tokens=st.integers(1, 8),
    prompt_tokens=st.integers(1, 60),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=12),
    seed=st.integers(0, 99),
)
def test_pages_are_saved_exactly_once_over_preemptions_and_prefix_hits(
    block_tokens: int, prompt_tokens: int, steps: list[tuple[bool, int]], seed: int
) -> None:
    generator = random.Random(seed)
    blocks = blocks_for(prompt_tokens, block_tokens)
    held = frozenset(generator.sample(range(blocks), generator.randrange(blocks)))
    plan = send_plan(prompt_tokens, block_tokens, held)
    saved: list[int] = []
    tokens, ids = 0, list(range(blocks))
    for preempted, count in [*steps, (False, prompt_tokens)]:
        if preempted:  # other blocks next time, and perhaps a hit in the engine's prefix cache
            tokens = generator.randrange(blocks) * block_tokens
            ids = generator.sample(range(1000), blocks)
        tokens = min(prompt_tokens + 3, tokens + count)
        for index, block_ids, _ in plan.step([ids, ids[::-1]], tokens_after=tokens):
            assert block_ids == (ids[index], ids[-1 - index])
            assert (index + 1) * block_tokens <= tokens or tokens >= prompt_tokens
            saved.append(index)
    assert plan.complete
    assert sorted(saved) == sorted(set(range(blocks)) - held)
    assert plan.blocks_to_save == len(saved)


def test_a_prompt_held_by_the_store_needs_nothing() -> None:
    assert send_plan(8, 4, frozenset({0, 1})).complete


def test_places_must_cover_the_prompt() -> None:
    with pytest.raises(Refused):
        SendPlan([place(0)], prompt_tokens=5, block_tokens=4)
    with pytest.raises(Refused):
        LoadPlan([place(0)], [[1], [1, 2]], group_of=[0, 1])
    with pytest.raises(Refused):
        LoadPlan([], [[]], group_of=[0])


@settings(max_examples=150, deadline=None)
@given(
    group_of=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    blocks=st.integers(1, 6),
    pages_max=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_loads_follow_watermarks_and_take_each_page_once(
    group_of: list[int], blocks: int, pages_max: int, seed: int
) -> None:
    """Some blocks of groups 1 and 2 are behind a window: their layers need no page."""
    generator = random.Random(seed)
    layers = len(group_of)
    behind = [0, generator.randrange(blocks + 1), generator.randrange(blocks + 1)]
    tables = [[NO_BLOCK if n < behind[g] else 50 + 10 * g + n for n in range(blocks)] for g in range(3)]
    needed = {(layer, n) for layer in range(layers) for n in range(blocks) if tables[group_of[layer]][n]}
    places = [place(n) for n in range(blocks)]
    plan = LoadPlan(places, tables, group_of=group_of)
    landed = [0] * blocks
    seen: set[tuple[int, int]] = set()
    for _ in range(1000):
        if plan.complete:
            break
        for n in range(blocks):
            landed[n] = min(layers, landed[n] + generator.randrange(3))
        batches = plan.batches(lambda at: landed[places.index(at)], pages_max=pages_max)
        for layer, positions in itertools.islice(batches, generator.randrange(9)):
            assert 1 <= len(positions) <= pages_max
            assert all(layer < landed[n] for n in positions)
            assert seen.isdisjoint((layer, n) for n in positions)
            seen.update((layer, n) for n in positions)
            plan.done(layer, positions)
        missing = {n for layer, n in needed - seen}
        assert plan.unverified_block_ids == {table[n] for table in tables for n in missing} - {NO_BLOCK}
    assert plan.complete
    assert seen == needed
    assert plan.pages_done == len(needed)


def test_little_is_looked_at_while_nothing_lands() -> None:
    """A step of a decode engine that waits for twenty long prompts is as short as one that waits for none."""
    blocks, layers = 2000, 4
    plan = LoadPlan([place(n) for n in range(blocks)], [list(range(1, blocks + 1))], group_of=[0] * layers)
    looked: list[int] = []
    landed = dict.fromkeys(range(100), layers)

    def watermark(at: Place) -> int:
        looked.append(places[at])
        return landed.get(looked[-1], 0)

    places = {at: n for n, at in enumerate(plan.places)}
    for layer, positions in plan.batches(watermark, pages_max=1000):
        plan.done(layer, positions)
    assert len(looked) == 100 + LOOK_AHEAD
    looked.clear()
    assert list(plan.batches(watermark, pages_max=1000)) == []
    assert looked == list(range(100, 100 + LOOK_AHEAD))
    landed.update(dict.fromkeys(range(110, blocks), layers))  # what lands behind a gap is not lost
    landed.update(dict.fromkeys(range(100, 110), layers))
    for layer, positions in plan.batches(watermark, pages_max=1000):
        plan.done(layer, positions)
    assert plan.complete


def test_of_much_that_has_landed_a_step_looks_at_a_window() -> None:
    """A step's few batches are to be copies, not a search; and what is cut short keeps its leading blocks."""
    blocks, layers = 2000, 4
    plan = LoadPlan([place(n) for n in range(blocks)], [list(range(1, blocks + 1))], group_of=[0] * layers)
    looked: list[Place] = []

    def watermark(at: Place) -> int:
        looked.append(at)
        return layers

    for _ in range(WINDOW * layers // 8):
        (first,) = itertools.islice(plan.batches(watermark, pages_max=8), 1)
        plan.done(*first)
        assert len(looked) <= WINDOW
        looked.clear()
    assert plan.unverified_block_ids == set(range(WINDOW + 1, blocks + 1))
    for layer, positions in plan.batches(watermark, pages_max=8):
        plan.done(layer, positions)
    assert plan.complete, "who has time takes all of it"


def test_promised_tokens() -> None:
    assert [promised_tokens(n, prompt_tokens=40, block_tokens=16) for n in range(4)] == [0, 16, 32, 40]
    assert promised_tokens(2, prompt_tokens=32, block_tokens=16) == 32


def test_places_outside_the_arena_do_not_fit() -> None:
    layout = PageLayout(layers=2, page_bytes=1024, chunk_blocks=1)
    good = Place(CONTROL_BYTES + 4096, 1, 0, CONTROL_BYTES, 1)
    arena_bytes = CONTROL_BYTES + 8192
    assert fits(good, layout, arena_bytes)
    for bad in (
        Place(arena_bytes, 1, 0, CONTROL_BYTES, 1),
        Place(arena_bytes - 100, 1, 0, CONTROL_BYTES, 1),
        Place(CONTROL_BYTES + 4096, 4, 0, CONTROL_BYTES, 1),
        Place(CONTROL_BYTES + 4096, 1, 1, CONTROL_BYTES, 1),
        Place(CONTROL_BYTES + 4096, 1, -1, CONTROL_BYTES, 1),
        Place(CONTROL_BYTES + 4096, 1, 0, CONTROL_BYTES + 1, 1),
        Place(CONTROL_BYTES + 4096, 1, 0, arena_bytes, 1),
        Place(-4096, 1, 0, CONTROL_BYTES, 1),
        Place(0, 1, 0, CONTROL_BYTES, 1),
    ):
        assert not fits(bad, layout, arena_bytes)
