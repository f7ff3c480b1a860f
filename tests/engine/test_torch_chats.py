"""Chats of torch engines over two real pdxd processes: prefill computes what is new, nothing that decode has said."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from daemon.fleet import Daemon, fleet_in, until
from daemon_pair import Pair, alone
from device_pair import device_mover_of
from torch_engine import BLOCK_TOKENS, LAYERS, VOCABULARY

from pdx.wire import Budgets

TURNS = 8
# A return that a machine's pause makes late is not tried again, and here each is looked for.
BUDGETS = Budgets(grant_s=60.0, slab_s=60.0, total_s=120.0, claim_s=60.0)


@pytest.fixture(params=["split", "alike", "device", "one rank"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    mover_of = device_mover_of if request.param == "device" else None
    ranks = 2 if request.param in ("split", "alike") else 1
    with fleet_in(tmp_path) as fleet:
        pair = Pair(
            fleet, fleet.daemon(), fleet.daemon(), ranks=ranks, alike=request.param == "alike", mover_of=mover_of,
            offload="all", budgets=BUDGETS,
        )  # fmt: skip
        try:
            yield pair
        finally:
            pair.close()
        for daemon in fleet.daemons:
            daemon.wait_unleased()


def test_every_turn_computes_only_what_is_new(pair: Pair) -> None:
    """Of an answer, every block that was whole a step before its end: see test_torch_prefixes."""
    generator = random.Random(5)
    pair.is_slow = True
    engine, decode = pair.prefill.engine, pair.daemons["decode"]
    chat: list[int] = []
    kept = returned = 0
    for turn in range(TURNS):
        chat += [generator.randrange(VOCABULARY) for _ in range(generator.randrange(3, 20))]
        prompt = list(chat)
        before, put, had = engine.forward_tokens, decode.counter("pages_put"), decode.counter("blocks_kept")
        answer = pair.ask(2 * turn, prompt, answer_tokens=generator.randrange(2, 24))
        while engine.unfinished:
            pair.step()
        assert engine.forward_tokens - before == len(prompt) - kept
        answer()
        pair.settle()
        decode.wait_unleased()  # it has heard of all that was kept
        chat = list(pair.received[2 * turn].tokens)
        assert chat[len(prompt) :][:5] == alone(prompt)[: len(chat) - len(prompt)]
        prompt_blocks, whole = len(prompt) // BLOCK_TOKENS, (len(chat) - 2) // BLOCK_TOKENS
        new = decode.counter("blocks_kept") - had
        assert new == max(whole - prompt_blocks, 0)
        kept = (prompt_blocks + new) * BLOCK_TOKENS
        returned += new
        until(lambda: came_back(decode, returned), "the answer is back")  # noqa: B023
        pages = new * LAYERS * engine.shards
        assert decode.counter("pages_put") - put == pages
        engine.forget_prefixes()  # or its own cache would hide what came back
    assert returned > 2 * TURNS


def came_back(decode: Daemon, blocks: int) -> bool:
    counters = decode.stats()["counters"]
    lost = [name for name in ("returns_failed", "returns_dropped", "returns_evicted") if counters.get(name, 0)]
    assert not lost, lost
    return bool(counters.get("blocks_returned", 0) == blocks)
