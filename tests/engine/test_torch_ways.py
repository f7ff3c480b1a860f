"""The two quick ways to decode's first token: behind prefill's (seeded), and beside prefill's request (early)."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYERS, LAYOUT, Request
from torch_pair import DECODE_SCHEDULER, Side, alone, last_let_go, loading, prompt, run, sending, side

from pdx.layout import blocks_for
from pdx.wire import Budgets, OpenLoad


@pytest.fixture
def daemon() -> MemoryDaemon:
    return MemoryDaemon(LAYOUT, blocks=256, digest_mode=True)


@pytest.fixture
def prefill(daemon: MemoryDaemon, clock: Clock) -> Side:
    return side(daemon, "prefill", clock)


@pytest.fixture
def decode(daemon: MemoryDaemon, clock: Clock) -> Side:
    return side(daemon, "decode", clock)


def seeded(daemon: MemoryDaemon, tokens: list[int], seed: int) -> Request:
    """What decode gets after prefill's first token has gone to the client."""
    parameters = {"do_remote_prefill": True, "pdx_handle": daemon.handle(), "pdx_tokens": len(tokens)}
    return Request("d1", [*tokens, seed], parameters, max_tokens=4)


def early(daemon: MemoryDaemon, tokens: list[int], *, budgets: Budgets | None = None) -> Request:
    """What decode gets at the same time as prefill gets its request."""
    request = loading(daemon, tokens, budgets=budgets)
    assert request.kv_transfer_params is not None
    request.kv_transfer_params["pdx_early"] = True
    return request


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 7, 23, 32])
def test_decode_goes_on_from_prefill_s_first_token(
    daemon: MemoryDaemon, prefill: Side, decode: Side, tokens: int
) -> None:
    """With blocks of 4: the seed opens a block, lies in the tail, or makes the tail a full block."""
    text = prompt(31, tokens)
    sent = prefill.engine.add(sending(daemon, text))
    run(prefill.engine)
    received = decode.engine.add(seeded(daemon, text, sent.output[0]))
    run(decode.engine)
    assert sent.output + received.output == alone(text)
    end = last_let_go(daemon, "load")
    assert (end.ok, end.pages) == (True, LAYERS * blocks_for(tokens, BLOCK_TOKENS))
    assert decode.engine.forward_tokens == 1 + 3, "the seed, then three more"
    again = decode.engine.add(Request("again", [*text, *sent.output, *received.output[:-1]], max_tokens=1))
    run(decode.engine)
    assert again.output == received.output[-1:], "blocks that were loaded in part are right in decode's own cache"


def test_decode_has_what_the_seed_s_handoff_covers(daemon: MemoryDaemon, prefill: Side, decode: Side) -> None:
    text = prompt(32, 24)
    decode.engine.add(Request("earlier", text))
    run(decode.engine)
    sent = prefill.engine.add(sending(daemon, text))
    run(prefill.engine)
    received = decode.engine.add(seeded(daemon, text, sent.output[0]))
    run(decode.engine)
    assert sent.output + received.output == alone(text)
    assert last_let_go(daemon, "load").reason == "the engine has it all"


@pytest.mark.parametrize("steps_before", [-1, 0, 1, 2, 9])
def test_an_early_request_waits_without_blocks_and_reads_along(
    daemon: MemoryDaemon, prefill: Side, decode: Side, steps_before: int
) -> None:
    """It comes before prefill's request, before its first step, in the middle, or after the push."""
    text = prompt(33, 35)
    received = early(daemon, text)
    if steps_before < 0:
        decode.engine.add(received)
        decode.engine.step()
    prefill.engine.add(sending(daemon, text))
    if steps_before >= 0:
        for _ in range(steps_before):
            prefill.engine.step()
        decode.engine.add(received)
    decode.engine.step()
    if steps_before < 1:
        assert (received.status, received.block_ids) == ("waiting", [])
    while prefill.engine.unfinished:
        prefill.engine.step()
        decode.engine.step()
        assert received.block_ids, "admitted with the first page"
    run(decode.engine)
    assert received.output == alone(text)
    assert last_let_go(daemon, "load").ok
    assert decode.engine.forward_tokens == 5


def test_an_early_request_does_not_ask_in_every_step(
    daemon: MemoryDaemon, prefill: Side, decode: Side, clock: Clock
) -> None:
    text = prompt(34, 9)
    decode.engine.add(early(daemon, text))
    for _ in range(100):
        decode.engine.step()
        clock.now += 0.041
    asked = [m for m in daemon.received if isinstance(m, OpenLoad)]
    assert 2 <= len(asked) <= 5
    assert all(m.early for m in asked)


def test_an_early_request_outlasts_the_grant_budget_and_ends_with_the_total(
    daemon: MemoryDaemon, decode: Side, clock: Clock
) -> None:
    text = prompt(35, 9)
    received = decode.engine.add(early(daemon, text, budgets=Budgets(grant_s=5.0, total_s=20.0)))
    clock.now += 24.0
    decode.engine.step()
    assert received.status == "waiting"
    clock.now += 4.0
    run(decode.engine)
    assert received.output == alone(text)


def test_an_early_request_whose_prefill_fails_is_computed_at_once(daemon: MemoryDaemon, decode: Side) -> None:
    text = prompt(36, 9)
    received = decode.engine.add(early(daemon, text))
    decode.engine.step()
    daemon.give_up()
    decode.engine.step()
    assert received.status == "running"
    run(decode.engine)
    assert received.output == alone(text)


def test_an_early_request_keeps_what_had_landed_when_prefill_failed(
    daemon: MemoryDaemon, prefill: Side, decode: Side
) -> None:
    text = prompt(37, 30)
    received = decode.engine.add(early(daemon, text))
    decode.engine.step()
    prefill.engine.add(sending(daemon, text))
    prefill.engine.step()
    decode.engine.step()
    assert received.status == "loading"
    daemon.end_load(daemon.clients[DECODE_SCHEDULER], (1).to_bytes(16, "big"), "prefill died")
    run(decode.engine)
    assert received.output == alone(text)
    assert decode.engine.forward_tokens == 30 - 8 + 4


def test_an_early_request_that_is_aborted_says_so(daemon: MemoryDaemon, decode: Side) -> None:
    received = decode.engine.add(early(daemon, prompt(38, 9)))
    decode.engine.step()
    decode.engine.abort(received)
    end = last_let_go(daemon, "load")
    assert (end.ok, end.reason) == (False, "request ended")
