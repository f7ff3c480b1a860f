"""Pairs of engines with two ranks on real pdxd processes: each rank moves its own and reports once; one may fail alone.

With "split" every rank has its own heads; with "alike" all ranks have the same KV, of which there is one shard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from daemon.fleet import Fleet, fleet_in, until
from daemon_pair import PROMPTS, Pair, alone, play, prompts
from device_pair import device_mover_of
from torch_engine import BLOCK_TOKENS, LAYERS
from torch_peer import TorchPeer

from pdx.layout import blocks_for
from pdx.wire import Budgets

RANKS = 2
PATIENT = Budgets(slab_s=10.0, total_s=25.0)  # nothing here waits for a budget to end
TEXT = list(range(37))
BLOCKS = blocks_for(len(TEXT), BLOCK_TOKENS)
MakePair = Callable[..., Pair]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_in(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def pair_of(fleet: Fleet) -> Iterator[MakePair]:
    pairs: list[Pair] = []

    def make(*, alike: bool = False, same_daemon: bool = False, device: bool = False) -> Pair:
        source = fleet.daemon()
        target = source if same_daemon else fleet.daemon()
        mover_of = device_mover_of if device else None
        pairs.append(Pair(fleet, source, target, ranks=RANKS, alike=alike, budgets=PATIENT, mover_of=mover_of))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture(params=["split", "alike"])
def pair(request: pytest.FixtureRequest, pair_of: MakePair) -> Pair:
    return pair_of(alike=request.param == "alike")


def handed_over(pair: Pair, *, to_the_end: bool = True) -> None:
    """Prefill has the prompt's KV, or only a part of it, and decode has the request."""
    answer = pair.ask(0, TEXT)
    while pair.prefill.engine.unfinished if to_the_end else pair.sent[0].num_computed_tokens == 0:
        pair.step()
    answer()


def loads(pair: Pair) -> tuple[int, int, int]:
    """Loads that went well, that did not, and pages verified, as decode's daemon counts them."""
    counters = pair.daemons["decode"].stats()["counters"]
    return counters.get("loads_ok", 0), counters.get("loads_failed", 0), counters.get("pages_verified", 0)


@pytest.mark.parametrize(
    "about", [{}, {"same_daemon": True}, {"alike": True}, {"device": True}, {"device": True, "alike": True}], ids=str
)
def test_answers_are_those_of_a_lone_engine(pair_of: MakePair, about: dict[str, bool]) -> None:
    pair, generator = pair_of(**about), random.Random(1)
    texts = prompts(generator)
    play(pair, texts, generator, preempt=0.1)
    pair.settle()
    assert pair.wrong(texts) == []
    for daemon in pair.fleet.daemons:
        daemon.wait_unleased()
    assert loads(pair)[:2] == (PROMPTS, 0), "of each load one word, whatever the number of ranks"


def test_every_rank_has_its_pages(pair: Pair) -> None:
    handed_over(pair)
    pair.settle()
    assert pair.received[0].output == alone(TEXT)
    assert pair.decode.engine.forward_tokens == 5
    assert loads(pair) == (1, 0, RANKS * LAYERS * BLOCKS)
    assert pair.daemons["prefill"].counter("pages_put") == pair.prefill.engine.shards * LAYERS * BLOCKS


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_that_end_a_load_in_different_steps(pair: Pair, slow: int) -> None:
    engine = pair.decode.engine
    engine.stalled = {slow}
    handed_over(pair)
    until(lambda: pair.step() or pair.received[0].status != "waiting", "the daemon has answered")
    for _ in range(20):
        pair.step()
    assert pair.received[0].status == "loading", "half of its pages are missing"
    assert loads(pair) == (0, 0, 0), "the daemon has heard of no end"
    engine.stalled = set()
    pair.settle()
    assert pair.received[0].output == alone(TEXT)
    assert loads(pair) == (1, 0, RANKS * LAYERS * BLOCKS)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_page_of_one_rank_costs_the_request_that_block(pair_of: MakePair, rank: int) -> None:
    pair = pair_of()
    handed_over(pair)
    pair.settle()
    pair.decode.engine.forget_prefixes()
    spoil_one_page(pair, rank)
    answer = pair.ask(2, TEXT)
    while pair.prefill.engine.unfinished:
        pair.step()
    answer()
    pair.settle()
    assert pair.received[2].output == alone(TEXT)
    pair.daemons["decode"].wait_unleased()
    assert loads(pair)[:2] == (1, 1)
    assert pair.daemons["decode"].counter("blocks_spoilt") == 1


def test_no_rank_waits_for_pages_that_are_of_no_use_any_more(pair_of: MakePair) -> None:
    """One rank finds a wrong page while prefill still computes: the other takes what is there, and decode goes on."""
    pair = pair_of()
    engine = pair.decode.engine
    engine.stalled = {0, 1}
    handed_over(pair, to_the_end=False)
    until(lambda: pair.daemons["decode"].counter("pages_landed") >= 2 * RANKS * LAYERS, "two blocks have landed")
    while pair.received[0].status != "loading":
        engine.step()
    place = next(iter(engine.scheduler._loads._loads.values())).places[1]  # type: ignore[union-attr]
    worker = pair.decode.clients[1]
    assert worker is not None and worker.arena is not None
    worker.arena.set_checksum(place, 0, 1)
    engine.stalled = set()
    for _ in range(3):
        engine.step()
    assert pair.received[0].status != "loading"
    pair.settle()
    assert pair.received[0].output == alone(TEXT)


def test_new_weights_of_one_rank_end_the_whole_load_and_part_the_pair(pair: Pair) -> None:
    """Of the other rank's shard nothing has changed, and what it has loaded is right: the request gets nothing."""
    states = {peer: ["start"] for peer in (pair.prefill, pair.decode)}
    for peer, state in states.items():
        peer.engine.watches[1].begin(lambda state=state: state[0])  # type: ignore[misc]

    def update(peer: TorchPeer) -> None:
        states[peer][0] = "later"
        peer.engine.watches[1].mark()

    pair.decode.engine.stalled = {0, 1}
    handed_over(pair)
    while pair.received[0].status != "loading":
        pair.step()
    update(pair.decode)
    pair.decode.engine.stalled = set()
    pair.settle()
    assert pair.received[0].output == alone(TEXT)
    assert pair.decode.engine.forward_tokens == len(TEXT) + 4
    for daemon in pair.fleet.daemons:
        daemon.wait_unleased()
    assert loads(pair)[:2] == (0, 1)
    handed_over(pair)
    pair.settle()
    assert loads(pair)[:2] == (0, 1), "prefill's are others now"
    update(pair.prefill)
    pair.step()
    pair.decode.engine.forget_prefixes()
    handed_over(pair)
    pair.settle()
    assert loads(pair)[:2] == (1, 1), "the same on both sides"


def test_an_abort_ends_in_all_ranks(pair: Pair) -> None:
    pair.decode.engine.stalled = {1}
    handed_over(pair)
    until(lambda: pair.step() or pair.received[0].status == "loading", "it loads")
    pair.decode.engine.abort(pair.received[0])
    pair.step()
    assert pair.received[0].block_ids, "rank 1 may still write there"
    pair.decode.engine.stalled = set()
    until(lambda: pair.step() or not pair.received[0].block_ids, "all ranks have let go")
    for daemon in pair.fleet.daemons:
        daemon.wait_unleased()


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_daemon_killed_in_the_middle_changes_no_answer(pair_of: MakePair, victim: str) -> None:
    pair = pair_of()
    generator = random.Random(3)
    texts = dict(list(prompts(generator).items())[:8])
    answers = [pair.ask(number, tokens) for number, tokens in texts.items()]
    for answer in answers[::2]:
        answer()
    for _ in range(generator.randrange(3, 9)):
        pair.step()
    pair.daemons[victim].kill()
    for answer in answers[1::2]:
        answer()
    pair.settle()
    assert pair.wrong(texts) == []


def spoil_one_page(pair: Pair, rank: int) -> None:
    """Of this rank's, in decode's arena."""
    worker = pair.decode.clients[1 + rank]
    assert worker is not None and worker.arena is not None
    everything = bytes(worker.arena.memory)
    pages = (page.tobytes() for page in pair.decode.engine.pages(rank)[1])
    at = next(at for page in pages if any(page) and (at := everything.find(page)) >= 0)
    worker.arena.memory[at + 7] ^= 1
