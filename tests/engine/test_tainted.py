"""Requests of two kinds of weights, and what they leave in the engine's own cache."""

from __future__ import annotations

from collections.abc import Iterable

from pdx.engine.vllm.tainted import Tainted


class Cache:
    """Block ids by request, and which of them others can find."""

    def __init__(self, **tables: set[int]) -> None:
        self.tables = tables
        self.found = set(range(100))

    def blocks_of(self, request_id: str) -> set[int]:
        return self.tables.get(request_id, set())

    def named(self, request_id: str) -> int:
        return len(self.blocks_of(request_id) & self.found)

    def forget(self, block_ids: Iterable[int] | None) -> None:
        self.found -= self.found if block_ids is None else set(block_ids)


def test_a_block_that_leaves_behind_a_window_is_not_found_again() -> None:
    """vLLM frees it while its request runs on: at the request's end nobody says that it was one of its blocks."""
    cache, tainted = Cache(old={1, 2}), Tainted()
    tainted.bind(cache)
    tainted.begin(["old"])
    cache.found = {3, 4}  # whole since, one computed with either weights
    cache.tables = {"old": {2, 3}, "new": {4}}
    tainted.stepped([])
    cache.tables["old"] = {5}
    tainted.finished("old")
    assert cache.found == {4}


def test_a_step_in_which_nothing_gets_a_name_looks_at_no_block() -> None:
    """Old answers may go on for thousands of steps, of thousands of blocks each."""
    cache, tainted = Cache(old={1, 2}), Tainted()
    tainted.bind(cache)
    tainted.begin(["old"])
    tainted.stepped([])
    forgotten: list[object] = []
    cache.forget = forgotten.append  # type: ignore[method-assign,assignment]
    for _ in range(3):
        tainted.stepped([])
    assert forgotten == []
    cache.found = {2}
    tainted.stepped([])
    assert forgotten == [{1, 2}]
