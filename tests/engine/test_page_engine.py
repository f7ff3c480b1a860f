"""The soak's engine must notice what it is there to notice."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from page_engine import PageEngine, answer_to
from torch_engine import Request


def test_it_answers_as_told_beforehand_and_finds_nothing_wrong() -> None:
    engine = PageEngine(tokens_a_step=5)
    requests = [engine.add(Request(f"r{n}", list(range(n, n + 23)), max_tokens=3)) for n in range(3)]
    while engine.unfinished:
        engine.step()
    assert [request.output for request in requests] == [answer_to(request.prompt_token_ids, 3) for request in requests]
    assert engine.wrong == []
    assert engine.prune() == requests


@pytest.mark.parametrize("position", [0, 9])
def test_one_wrong_byte_is_found(position: int) -> None:
    engine = PageEngine(tokens_a_step=10)
    request = engine.add(Request("r", list(range(23))))
    engine.step()
    block = request.block_ids[position // 4]
    engine.caches[0, 1, block, position % 4, 1, 15] += 1
    engine.step()
    assert engine.wrong == [f"r: layer 1, 1 of 20 rows, first {position}"]


def test_pages_of_another_text_are_found() -> None:
    engine = PageEngine()
    first = engine.add(Request("first", [1, 2, 3, 4, 5]))
    engine.step()
    other = engine.add(Request("other", [1, 2, 3, 9, 5]))
    other.block_hashes = first.block_hashes  # as if two texts had one name
    engine.step()
    assert engine.wrong[0] == "other: layer 0, 1 of 5 rows, first 3"
