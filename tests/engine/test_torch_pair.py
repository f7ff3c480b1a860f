"""Two torch engines, both halves of the connector in each, one daemon in memory: real attention, real preemptions."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYERS, LAYOUT, Request
from torch_pair import (
    DECODE_SCHEDULER,
    DECODE_WORKER,
    PREFILL_WORKER,
    STEPS_MAX,
    Side,
    alone,
    last_let_go,
    loading,
    prompt,
    run,
    sending,
    side,
)

from pdx.layout import blocks_for
from pdx.wire import Budgets, Filled


@pytest.fixture
def daemon() -> MemoryDaemon:
    return MemoryDaemon(LAYOUT, blocks=256, digest_mode=True)


@pytest.fixture
def prefill(daemon: MemoryDaemon, clock: Clock) -> Side:
    return side(daemon, "prefill", clock)


@pytest.fixture
def decode(daemon: MemoryDaemon, clock: Clock) -> Side:
    return side(daemon, "decode", clock)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 23, 32])
def test_decode_continues_what_prefill_computed(daemon: MemoryDaemon, prefill: Side, decode: Side, tokens: int) -> None:
    text = prompt(1, tokens)
    sent = prefill.engine.add(sending(daemon, text))
    run(prefill.engine)
    pages = LAYERS * blocks_for(tokens, BLOCK_TOKENS)
    assert sent.result == {"handoff": (1).to_bytes(16, "big").hex(), "pages": pages}
    send_end = last_let_go(daemon, "send")
    assert (send_end.ok, send_end.pages) == (True, pages)

    received = decode.engine.add(loading(daemon, text))
    decode.engine.step()
    assert received.status == "waiting"  # loaded, to be scheduled
    assert decode.engine.forward_tokens == 0
    run(decode.engine)
    assert received.output == alone(text)
    load_end = last_let_go(daemon, "load")
    assert (load_end.ok, load_end.pages) == (True, pages)
    # Only the last prompt token was computed again, then four more were decoded.
    assert decode.engine.forward_tokens == 1 + 4


def test_pages_arrive_bit_exact(daemon: MemoryDaemon, prefill: Side, decode: Side) -> None:
    text = prompt(2, 30)
    sent = sending(daemon, text)
    sent.max_tokens = 2
    prefill.engine.add(sent)
    while not sent.output:
        prefill.engine.step()
    source_blocks = list(sent.block_ids)[:8]
    run(prefill.engine)
    received = decode.engine.add(loading(daemon, text))
    decode.engine.step()
    source = prefill.engine.prompt_bytes(sent, source_blocks)
    assert (decode.engine.prompt_bytes(received, received.block_ids) == source).all()


def test_many_requests_a_step_and_random_preemptions_save_every_page_once(
    daemon: MemoryDaemon, prefill: Side, decode: Side
) -> None:
    generator = random.Random(3)
    shared = prompt(4, 12)
    texts = {n: (shared if n % 2 else []) + prompt(n, generator.randrange(1, 40)) for n in range(1, 9)}
    requests = [prefill.engine.add(sending(daemon, text, n)) for n, text in texts.items()]
    for _ in range(STEPS_MAX):
        if not prefill.engine.unfinished:
            break
        running = [r for r in requests if r.status == "running"]
        if running and generator.random() < 0.3:
            prefill.engine.preempt(generator.choice(running))
            if generator.random() < 0.5:
                prefill.engine.forget_prefixes()
        prefill.engine.step()
    run(prefill.engine)
    for n, text in texts.items():
        handoff = daemon.handoffs[n.to_bytes(16, "big")]
        blocks = blocks_for(len(text), BLOCK_TOKENS)
        assert handoff.filled == {block: set(range(LAYERS)) for block in range(blocks)}  # twice would have raised
        assert last_let_go(daemon, "send", n).ok
    received = {n: decode.engine.add(loading(daemon, text, n)) for n, text in texts.items()}
    run(decode.engine)
    for n, text in texts.items():
        assert received[n].output == alone(text)
        assert last_let_go(daemon, "load", n).ok


def test_a_hit_block_that_a_neighbour_computes_in_the_same_step(
    daemon: MemoryDaemon, clock: Clock, decode: Side
) -> None:
    prefill = side(daemon, "prefill", clock, tokens_a_step=100)
    shared = prompt(5, 12)
    texts = {1: shared + prompt(6, 5), 2: shared + prompt(7, 6)}
    first, second = (prefill.engine.add(sending(daemon, text, n)) for n, text in texts.items())
    prefill.engine.step()
    assert (first.status, second.status) == ("finished", "finished")
    assert prefill.engine.forward_tokens == 17 + 6  # the second computed none of the shared blocks
    requests = [decode.engine.add(loading(daemon, text, n)) for n, text in texts.items()]
    run(decode.engine)
    assert [request.output for request in requests] == [alone(text) for text in texts.values()]


def test_one_filled_message_per_step_and_layer(daemon: MemoryDaemon, clock: Clock) -> None:
    prefill = side(daemon, "prefill", clock, tokens_a_step=100)
    for n in (1, 2, 3):
        prefill.engine.add(sending(daemon, prompt(n, 9), n))
    prefill.engine.step()
    filled = [m for m in daemon.received if isinstance(m, Filled)]
    assert [m.layer for m in filled] == list(range(LAYERS))
    assert all(len(m.entries) == 3 for m in filled)


def test_decode_reads_along_while_prefill_computes(daemon: MemoryDaemon, prefill: Side, decode: Side) -> None:
    text = prompt(8, 35)
    prefill.engine.add(sending(daemon, text))
    prefill.engine.step()
    received = decode.engine.add(loading(daemon, text))
    decode.engine.step()
    assert received.status == "loading"
    while prefill.engine.unfinished:
        prefill.engine.step()
        decode.engine.step()
    run(decode.engine)
    assert received.output == alone(text)
    assert decode.engine.forward_tokens == 5


def test_a_local_prefix_is_not_loaded_again(daemon: MemoryDaemon, prefill: Side, decode: Side) -> None:
    text = prompt(9, 22)
    decode.engine.add(Request("earlier", text[:13]))
    run(decode.engine)
    prefill.engine.add(sending(daemon, text))
    run(prefill.engine)
    received = decode.engine.add(loading(daemon, text))
    run(decode.engine)
    assert received.output == alone(text)
    assert last_let_go(daemon, "load").pages == LAYERS * (6 - 3)


def test_another_prompt_gets_only_the_common_blocks(daemon: MemoryDaemon, prefill: Side, decode: Side) -> None:
    text = prompt(10, 20)
    prefill.engine.add(sending(daemon, text))
    run(prefill.engine)
    other = text[:9] + prompt(11, 8)
    received = decode.engine.add(loading(daemon, other))
    run(decode.engine)
    assert received.output == alone(other)
    assert last_let_go(daemon, "load").pages == LAYERS * 2


@pytest.mark.parametrize("block", [0, 2, 5])
def test_a_bad_page_is_recomputed_and_never_used(daemon: MemoryDaemon, prefill: Side, decode: Side, block: int) -> None:
    text = prompt(12, 22)
    prefill.engine.add(sending(daemon, text))
    run(prefill.engine)
    at = daemon.handoffs[(1).to_bytes(16, "big")].places[block]
    daemon.arena.memory[at.page_offset(LAYOUT, 1) + 5] ^= 0xFF
    received = decode.engine.add(loading(daemon, text))
    run(decode.engine)
    assert received.output == alone(text)
    end = last_let_go(daemon, "load")
    assert not end.ok
    assert "checksum" in end.reason
    assert end.spoilt == [block]


def test_load_ended_keeps_what_landed_and_recomputes_the_rest(
    daemon: MemoryDaemon, prefill: Side, decode: Side
) -> None:
    text = prompt(13, 30)
    prefill.engine.add(sending(daemon, text))
    prefill.engine.step()  # 10 of 30 tokens: two whole blocks
    received = decode.engine.add(loading(daemon, text))
    decode.engine.step()
    decode.engine.step()
    assert received.status == "loading"
    daemon.end_load(daemon.clients[DECODE_SCHEDULER], (1).to_bytes(16, "big"), "prefill died")
    run(decode.engine)
    assert received.output == alone(text)
    end = last_let_go(daemon, "load")
    assert (end.ok, end.pages) == (False, 2 * LAYERS)
    assert decode.engine.forward_tokens == 30 - 8 + 4


def test_a_load_that_never_comes_ends_at_its_deadline(
    daemon: MemoryDaemon, prefill: Side, decode: Side, clock: Clock
) -> None:
    text = prompt(14, 30)
    prefill.engine.add(sending(daemon, text))
    prefill.engine.step()
    received = decode.engine.add(loading(daemon, text, budgets=Budgets(total_s=4.0)))
    decode.engine.step()
    clock.now += 3.9
    decode.engine.step()
    assert received.status == "loading"
    clock.now += 0.2
    run(decode.engine)
    assert received.output == alone(text)
    assert last_let_go(daemon, "load").reason == "out of time"


def test_an_abort_while_loading_frees_blocks_after_the_worker_let_go(
    daemon: MemoryDaemon, prefill: Side, decode: Side
) -> None:
    text = prompt(15, 30)
    prefill.engine.add(sending(daemon, text))
    prefill.engine.step()
    received = decode.engine.add(loading(daemon, text))
    decode.engine.step()
    decode.engine.abort(received)
    assert received.block_ids  # still held
    assert not [m for m in daemon.let_go if m.side == "load"]
    decode.engine.step()
    assert not received.block_ids
    end = last_let_go(daemon, "load")
    assert daemon.fence(daemon.clients[DECODE_WORKER]) >= end.fence


def test_an_abort_of_a_send_tells_the_fence(daemon: MemoryDaemon, prefill: Side) -> None:
    request = prefill.engine.add(sending(daemon, prompt(16, 30)))
    prefill.engine.step()
    prefill.engine.abort(request)
    end = last_let_go(daemon, "send")
    assert (end.ok, end.fence) == (False, 1)
    assert daemon.fence(daemon.clients[PREFILL_WORKER]) == 1


def test_a_request_waits_for_its_claim_then_goes_without(daemon: MemoryDaemon, prefill: Side, clock: Clock) -> None:
    daemon.hold_back = True
    text = prompt(17, 9)
    request = prefill.engine.add(sending(daemon, text))
    prefill.engine.step()
    assert request.status == "waiting"
    clock.now += 60.0
    run(prefill.engine)
    assert request.result is None
    assert not last_let_go(daemon, "send").ok
    daemon.hold_back = False
    prefill.engine.step()  # the late answer is given back
    assert [m.reason for m in daemon.let_go][-1] == "request is gone"
    assert not [m for m in daemon.received if isinstance(m, Filled)]


def test_wait_is_asked_again_after_a_while(daemon: MemoryDaemon, prefill: Side, decode: Side, clock: Clock) -> None:
    text = prompt(18, 9)
    prefill.engine.add(sending(daemon, text))
    run(prefill.engine)
    daemon.load_status = "wait"
    received = decode.engine.add(loading(daemon, text))
    asked = len(daemon.received)
    for _ in range(5):
        decode.engine.step()
    assert len(daemon.received) == asked + 1  # Renew: at the same instant nothing is asked again
    daemon.load_status = None
    clock.now += 0.006
    run(decode.engine)
    assert received.output == alone(text)
    assert last_let_go(daemon, "load").ok


@pytest.mark.parametrize("status", ["absent", "forged", "unknown"])
def test_without_kv_the_prompt_is_computed(daemon: MemoryDaemon, decode: Side, status: str) -> None:
    text = prompt(19, 14)
    request = loading(daemon, text)
    if status == "forged":
        assert request.kv_transfer_params is not None
        request.kv_transfer_params["pdx_handle"] = "forged"
    daemon.load_status = "absent" if status == "absent" else None
    decode.engine.add(request)
    run(decode.engine)
    assert request.output == alone(text)


@pytest.mark.parametrize("steps", range(5))
def test_a_daemon_dying_at_any_step_changes_no_answer(
    daemon: MemoryDaemon, prefill: Side, decode: Side, steps: int
) -> None:
    text = prompt(20, 30)
    sent = prefill.engine.add(sending(daemon, text))
    prefill.engine.step()
    received = decode.engine.add(loading(daemon, text))
    for _ in range(steps):
        prefill.engine.step()
        decode.engine.step()
    daemon.die()
    run(prefill.engine)
    run(decode.engine)
    assert received.output == alone(text)
    assert sent.output == alone(text)[:1]


def test_a_new_daemon_is_not_given_places_of_the_old(daemon: MemoryDaemon, prefill: Side, decode: Side) -> None:
    text = prompt(21, 30)
    prefill.engine.add(sending(daemon, text))
    prefill.engine.step()
    received = decode.engine.add(loading(daemon, text))
    decode.engine.step()
    daemon.die()
    successor = MemoryDaemon(LAYOUT, blocks=256, incarnation=2)
    before = bytes(successor.arena.memory[4096:])
    prefill.move_to(successor)
    decode.move_to(successor)
    run(prefill.engine)
    run(decode.engine)
    assert received.output == alone(text)
    assert bytes(successor.arena.memory[4096:]) == before
    sent, received = sending(successor, text, 2), loading(successor, text, 2)
    prefill.engine.add(sent)
    run(prefill.engine)
    decode.engine.forget_prefixes()
    decode.engine.add(received)
    run(decode.engine)
    assert received.output == alone(text)
    assert last_let_go(successor, "load", 2).ok
