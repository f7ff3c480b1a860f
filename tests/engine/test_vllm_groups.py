"""A model with sliding windows in vLLM's own scheduler: three KV groups over the same memory, some blocks forgotten.

Before each step the engine checks that every token of it would find, in every layer, all the KV that it looks back to.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: the connector is not tested against it")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("fresh_daemon")]

from memory_connector import the_daemon  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402
from vllm_engine import (  # noqa: E402
    BLOCK_TOKENS,
    BLOCKS,
    LAYERS,
    WINDOW,
    Engine,
    hybrid_config,
    kv_cache_config,
    sliding_window,
)

HANDOFF = (1).to_bytes(16, "big")


@pytest.fixture
def prefill(model_dir: Path) -> Engine:
    return Engine(model_dir, "kv_producer", hybrid_config(), offload="off")


@pytest.fixture
def decode(model_dir: Path) -> Engine:
    return Engine(model_dir, "kv_consumer", hybrid_config(), offload="off")


def tokens_of(count: int) -> list[int]:
    return [(5 * n + n * n) % 251 for n in range(count)]


def hand_over(prefill: Engine, decode: Engine, count: int, *, seeded: bool = False) -> int:
    """Pages that decode needed. `seeded`: its request has a token more than the handoff covers."""
    sending = {"do_remote_decode": True, "pdx_handle": the_daemon().handle()}
    prefill.add("p", tokens_of(count), sending)
    prefill.run()
    blocks = -(-count // BLOCK_TOKENS)
    assert prefill.outputs[-1].kv_transfer_params == {"pdx": {"handoff": HANDOFF.hex(), "pages": blocks * LAYERS}}
    loading = {"do_remote_prefill": True, "pdx_handle": the_daemon().handle(), "pdx_tokens": count}
    request = decode.add("d", tokens_of(count) + [7] * seeded, loading, max_tokens=3)
    assert decode.step().total_num_scheduled_tokens == 0
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert decode.holds(request, request.num_tokens - 1)
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [1, 1, 1, 0]
    (end,) = [m for m in the_daemon().let_go if m.side == "load"]
    assert end.ok
    return end.pages


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("count", [20, 32, 64, 65, 66, 70, 96, 97, 128, 129, 300])
def test_a_handoff_loads_what_decode_will_look_at(prefill: Engine, decode: Engine, count: int, seeded: bool) -> None:
    """Prompts of five windows in chunks of 64 tokens; among them those whose window begins with a block's last token,
    for which vLLM would keep one block too few if the whole prompt were loaded."""
    loaded = count if seeded else count - 1  # the last token is computed anyway
    blocks, behind = -(-loaded // BLOCK_TOKENS), max(0, loaded - WINDOW + 1) // BLOCK_TOKENS
    assert hand_over(prefill, decode, count, seeded=seeded) == LAYERS * blocks - 2 * behind


def test_a_model_of_windows_only_has_one_group(model_dir: Path) -> None:
    """The first blocks of a prompt are needed in no layer at all."""
    engines = [
        Engine(model_dir, role, kv_cache_config(sliding_window()), offload="off")
        for role in ("kv_producer", "kv_consumer")
    ]
    assert hand_over(engines[0], engines[1], 300) == LAYERS * (10 - (299 - WINDOW + 1) // BLOCK_TOKENS)


def test_a_bad_page_costs_the_whole_load(prefill: Engine, decode: Engine) -> None:
    """vLLM can't be told of single blocks here: its engine would die."""
    prefill.add("p", tokens_of(150), {"do_remote_decode": True, "pdx_handle": the_daemon().handle()})
    prefill.run()
    place = the_daemon().handoffs[HANDOFF].places[3]
    the_daemon().arena.memory[place.page_offset(the_daemon().layout, 1)] ^= 1
    loading = {"do_remote_prefill": True, "pdx_handle": the_daemon().handle()}
    request = decode.add("d", tokens_of(150), loading, max_tokens=2)
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [0, 64, 64, 150 - 128, 1, 0]
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert [(m.ok, m.spoilt) for m in the_daemon().let_go if m.side == "load"] == [(False, [3])]


def test_a_handoff_that_stops_coming_is_recomputed(prefill: Engine, decode: Engine) -> None:
    prefill.add("p", tokens_of(150), {"do_remote_decode": True, "pdx_handle": the_daemon().handle()})
    prefill.step()
    loading = {"do_remote_prefill": True, "pdx_handle": the_daemon().handle()}
    request = decode.add("d", tokens_of(150), loading, max_tokens=1)
    decode.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    line = decode.scheduler.connector._scheduler_side._link.client()  # type: ignore[union-attr]
    the_daemon().end_load(line, HANDOFF, "prefill died")
    assert [s.total_num_scheduled_tokens for s in decode.run()] == [0, 64, 64, 150 - 128, 0]


def test_an_abort_while_loading_is_clean(prefill: Engine, decode: Engine) -> None:
    prefill.add("p", tokens_of(150), {"do_remote_decode": True, "pdx_handle": the_daemon().handle()})
    prefill.step()
    decode.add("d", tokens_of(150), {"do_remote_prefill": True, "pdx_handle": the_daemon().handle()})
    decode.step()
    decode.scheduler.finish_requests("d", RequestStatus.FINISHED_ABORTED)
    decode.run()
    assert not decode.scheduler.requests
    assert decode.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def test_a_preempted_send_continues(prefill: Engine, decode: Engine) -> None:
    request = prefill.add("p", tokens_of(300), {"do_remote_decode": True, "pdx_handle": the_daemon().handle()})
    prefill.step()
    prefill.step()
    prefill.scheduler.running.remove(request)
    prefill.scheduler._preempt_request(request, 0.0)
    prefill.run()
    assert [(m.ok, m.pages) for m in the_daemon().let_go if m.side == "send"] == [(True, 10 * LAYERS)]


def test_a_prefix_that_layers_have_forgotten_ends_its_handoff(prefill: Engine) -> None:
    """The prefix comes from the engine's own cache, which has only the window's blocks of it in two layers."""
    prefill.add("warm", tokens_of(300), {})
    prefill.run()
    prefill.add("p", tokens_of(300), {"do_remote_decode": True, "pdx_handle": the_daemon().handle()})
    assert prefill.step().total_num_scheduled_tokens == 300 - 288
    prefill.run()
    assert prefill.outputs[-1].kv_transfer_params is None
    (end,) = [m for m in the_daemon().let_go if m.side == "send"]
    assert (end.ok, end.fence) == (False, 0)
    assert "prefix cache" in end.reason
    assert prefill.counts["blocks_forgotten"] == 7
    assert not the_daemon().handoffs[HANDOFF].filled, "no block is told of that lacks a page"


def test_a_short_prefix_hit_is_sent_too(prefill: Engine, decode: Engine) -> None:
    prefill.add("warm", tokens_of(70), {})
    prefill.run()
    hand_over(prefill, decode, 100)


def test_what_left_the_engine_s_cache_comes_back(model_dir: Path) -> None:
    """Blocks are offered in the very step that computes them: in the next one, the first may be forgotten."""
    engine = Engine(model_dir, "kv_both", hybrid_config())
    for turn, (loaded, kept) in enumerate([(0, 10), (288, 12), (320, 15)]):  # an answer's 7s are not in the next prompt
        request = engine.add(f"r{turn}", tokens_of(300 + 40 * turn), {}, max_tokens=40)
        assert (engine.step().total_num_scheduled_tokens == 0) == (loaded > 0)
        assert engine.holds(request, loaded)
        engine.run(steps=60)
        assert len(the_daemon().kept) == kept
        assert engine.scheduler.kv_cache_manager.reset_prefix_cache()
    assert all(m.ok for m in the_daemon().let_go)
    assert not engine.counts["blocks_forgotten"]


def test_room_that_comes_too_late_keeps_nothing(model_dir: Path) -> None:
    engine = Engine(model_dir, "kv_both", hybrid_config())
    request = engine.add("r", tokens_of(300), {}, max_tokens=3)
    the_daemon().hold_back = True
    deadline = time.monotonic() + 10.0
    while request.num_computed_tokens < 192:
        assert time.monotonic() < deadline
        engine.step()
    the_daemon().hold_back = False
    engine.run()
    assert engine.counts["blocks_forgotten"] == 4
    assert [m.ok for m in the_daemon().let_go if m.side == "send"] == [False]
    assert not the_daemon().kept
