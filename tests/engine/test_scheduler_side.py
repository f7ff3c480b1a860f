"""Corners of the scheduler's half that a run of engines does not show: budgets, refusals, renewals, odd daemons."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryAttachment, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYOUT, Request, Scheduled

from pdx.engine.link import Link
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.steps import LoadResult, Report
from pdx.layout import Place
from pdx.wire import BLOCKS_MAX, LoadEnded, LoadOpened, LookUp, OpenLoad, OpenSend, Renew, SendEnded, SendOpened

HANDOFF = (1).to_bytes(16, "big")
IDLE = Scheduled({}, {})


@pytest.fixture
def scheduler(daemon: MemoryDaemon, clock: Clock) -> SchedulerSide:
    link = Link(MemoryAttachment(daemon))  # type: ignore[arg-type]
    return SchedulerSide(link, role="both", layout=LAYOUT, block_tokens=BLOCK_TOKENS, clock=clock)


def send_request(daemon: MemoryDaemon, **attributes: Any) -> Any:
    return Request("s", list(range(10)), {"do_remote_decode": True, "pdx_handle": daemon.handle()}, **attributes)


def load_request(daemon: MemoryDaemon) -> Any:
    return Request("l", list(range(10)), {"do_remote_prefill": True, "pdx_handle": daemon.handle()})


@pytest.mark.parametrize(
    "request_",
    [
        {"mm_features": [SimpleNamespace(mm_position=SimpleNamespace(offset=0))]},
        {"prompt_embeds": SimpleNamespace(shape=(10, 8))},  # in the place of some tokens: the others have ids
        {"lora_request": SimpleNamespace(lora_name="new", lora_path="somewhere", load_inplace=False)},
    ],
)
def test_prompts_that_tokens_do_not_name_are_served_without_handoff(
    daemon: MemoryDaemon, scheduler: SchedulerSide, request_: dict[str, Any]
) -> None:
    scheduler.on_new_request(send_request(daemon, **request_))
    assert scheduler.matched_tokens("s", 0) == (0, False)
    assert daemon.received == []


@pytest.mark.parametrize(
    ("offset", "blocks"), [(0, 0), (BLOCK_TOKENS - 1, 0), (BLOCK_TOKENS, 1), (9, 9 // BLOCK_TOKENS)]
)
def test_only_what_comes_before_an_image_is_looked_for(daemon: MemoryDaemon, offset: int, blocks: int) -> None:
    """Its name may be a counter of this engine's life, or the client's own word."""
    link = Link(MemoryAttachment(daemon))  # type: ignore[arg-type]
    scheduler = SchedulerSide(link, role="both", layout=LAYOUT, block_tokens=BLOCK_TOKENS, offload="all")
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=offset))
    scheduler.on_new_request(Request("r", list(range(10)), mm_features=[image]))
    scheduler.matched_tokens("r", 0)
    asked = [len(message.block_hashes) for message in daemon.received if isinstance(message, LookUp)]
    assert asked == [blocks] * (blocks > 0)


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"do_remote_decode": True},
        {"pdx_handle": "x"},
        {"do_remote_decode": True, "pdx_handle": 5},
        {"do_remote_decode": True, "pdx_handle": "é"},
        {"do_remote_prefill": True, "pdx_handle": "x" * 100_000},
        {"do_remote_prefill": True, "pdx_handle": None},
        "text",
    ],
)
def test_clients_may_send_any_parameters(daemon: MemoryDaemon, scheduler: SchedulerSide, parameters: Any) -> None:
    scheduler.on_new_request(Request("r", [1, 2, 3], parameters))  # type: ignore[arg-type]
    assert scheduler.matched_tokens("r", 0) == (0, False)
    assert scheduler.finished("r") is None
    assert daemon.received == []


@pytest.mark.parametrize(
    "tokens", [0, -1, 11, True, "5", 5.0, None, [], 1 << 20_000], ids=lambda value: type(value).__name__
)
def test_a_handoff_covers_some_of_the_prompt_or_there_is_none(
    daemon: MemoryDaemon, scheduler: SchedulerSide, tokens: Any
) -> None:
    request = load_request(daemon)
    request.kv_transfer_params["pdx_tokens"] = tokens
    scheduler.on_new_request(request)
    assert scheduler.matched_tokens("l", 0) == (0, False)
    assert daemon.received == []


def test_what_the_handoff_covers_is_asked_for(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    for n, tokens in enumerate((1, 4, 9, 10)):
        request = load_request(daemon)
        request.kv_transfer_params |= {"pdx_handle": daemon.handle(n), "pdx_tokens": tokens}
        scheduler.on_new_request(request)
        asked = daemon.received[n]
        assert isinstance(asked, OpenLoad)
        assert (asked.prompt_tokens, len(asked.block_hashes)) == (tokens, tokens // BLOCK_TOKENS)
        assert bool(asked.tail_hash) == bool(tokens % BLOCK_TOKENS)


def test_spoilt_blocks_are_named_along_the_prompt(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    """The engine has the first block itself, so the worker's first place is the prompt's second block."""
    scheduler.on_new_request(send_request(daemon))
    scheduler.on_new_request(load_request(daemon))
    assert scheduler.matched_tokens("l", BLOCK_TOKENS) == (10 - BLOCK_TOKENS, True)
    scheduler.allocated("l", [[7, 8, 9]], 10 - BLOCK_TOKENS)
    scheduler.reported(Report(1, {"l": LoadResult(False, 0, 0, "differ", [1])}))
    assert daemon.let_go[-1].spoilt == [2]


def test_a_role_takes_only_its_own_requests(daemon: MemoryDaemon, clock: Clock) -> None:
    for role, request in (("decode", send_request(daemon)), ("prefill", load_request(daemon))):
        link = Link(MemoryAttachment(daemon))  # type: ignore[arg-type]
        side = SchedulerSide(link, role=role, layout=LAYOUT, block_tokens=BLOCK_TOKENS, clock=clock)  # type: ignore[arg-type]
        side.on_new_request(request)
    assert daemon.received == []


def test_a_silent_daemon_is_awaited_shortly_and_once(
    daemon: MemoryDaemon, scheduler: SchedulerSide, clock: Clock
) -> None:
    daemon.hold_back = True
    scheduler.on_new_request(load_request(daemon))
    for _ in range(3):
        assert scheduler.matched_tokens("l", 0) == (None, False)
        scheduler.step(IDLE)  # type: ignore[arg-type]
    assert len([m for m in daemon.received if isinstance(m, OpenLoad)]) == 1
    clock.now += 100.0
    assert scheduler.matched_tokens("l", 0) == (0, False)


def test_places_outside_the_arena_are_refused(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    daemon.hold_back = True
    scheduler.on_new_request(send_request(daemon))
    scheduler.on_new_request(load_request(daemon))
    client = daemon.clients[0]
    client.poll()
    client._inbox.clear()
    outside = [Place(daemon.arena_bytes, 1, 0, 4096, 1)] * 3
    client.deliver(SendOpened(request_id="s", handoff_id=HANDOFF, places=list(outside)))
    client.deliver(LoadOpened(request_id="l", handoff_id=HANDOFF, status="granted", places=list(outside)))
    daemon.hold_back = False
    assert scheduler.matched_tokens("s", 0) == (0, False)
    assert scheduler.matched_tokens("l", 0) == (0, False)
    assert [(m.side, m.ok) for m in daemon.let_go] == [("send", False), ("load", False)]
    assert "outside" in daemon.let_go[0].reason


def test_grants_that_do_not_fit_the_prompt_are_refused(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    scheduler.on_new_request(send_request(daemon))
    daemon.clients[0]._inbox.clear()
    places = [place for place in daemon.handoffs[HANDOFF].places][:2]
    daemon.clients[0].deliver(SendOpened(request_id="s", handoff_id=HANDOFF, places=list(places)))
    assert scheduler.matched_tokens("s", 0) == (0, False)
    assert "2 places" in daemon.let_go[0].reason
    daemon.clients[0].deliver(LoadOpened(request_id="never", handoff_id=HANDOFF, status="granted", places=places))
    scheduler.step(IDLE)  # type: ignore[arg-type]
    assert daemon.let_go[1].reason == "request is gone"


def test_a_prompt_that_the_store_holds_needs_no_pages(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    scheduler.on_new_request(send_request(daemon))
    daemon.clients[0]._inbox.clear()
    daemon.clients[0].deliver(SendOpened(request_id="s", handoff_id=HANDOFF, places=[None] * 3))
    assert scheduler.matched_tokens("s", 0) == (0, False)
    assert [(m.ok, m.fence) for m in daemon.let_go] == [(True, 0)]
    assert scheduler.finished("s") == {"handoff": HANDOFF.hex(), "pages": 0}


def test_a_daemon_that_asks_again_is_answered_again(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    """Our LET_GO was lost. Steps planned by now may still touch the slots, so they are the fence of a send."""
    for _ in range(3):
        scheduler.step(IDLE)  # type: ignore[arg-type]
    daemon.clients[0].deliver(SendEnded(request_id="", handoff_id=HANDOFF, reason="lease expired"))
    daemon.clients[0].deliver(LoadEnded(handoff_id=HANDOFF, reason="lease expired"))
    scheduler.step(IDLE)  # type: ignore[arg-type]
    assert [(m.side, m.fence) for m in daemon.let_go] == [("send", 3), ("load", 0)]


def test_no_step_has_touched_the_slots_of_a_daemon_that_came_after_it(daemon: MemoryDaemon) -> None:
    """An idle engine would not publish its old step's number to the new daemon: that fence would never pass."""
    attachment = MemoryAttachment(daemon)
    link = Link(attachment)  # type: ignore[arg-type]
    link.client()
    scheduler = SchedulerSide(link, role="prefill", layout=LAYOUT, block_tokens=BLOCK_TOKENS)
    for _ in range(3):
        scheduler.step(IDLE)  # type: ignore[arg-type]
    daemon.die()
    attachment.daemon = MemoryDaemon(LAYOUT, blocks=8, incarnation=2)
    scheduler.matched_tokens("any", 0)
    attachment.daemon.clients[0].deliver(SendEnded(request_id="", handoff_id=HANDOFF, reason="lease expired"))
    scheduler.finished("any")
    assert [(m.side, m.fence) for m in attachment.daemon.let_go] == [("send", 0)]


def test_places_are_those_of_the_daemon_that_granted_them(daemon: MemoryDaemon) -> None:
    """The next one may be there when the step is made: places in its arena may hold anybody's blocks."""
    attachment = MemoryAttachment(daemon)
    link = Link(attachment)  # type: ignore[arg-type]
    scheduler = SchedulerSide(link, role="both", layout=LAYOUT, block_tokens=BLOCK_TOKENS)
    scheduler.on_new_request(send_request(daemon))
    scheduler.on_new_request(load_request(daemon))
    assert scheduler.matched_tokens("l", 0) == (10, True)
    scheduler.allocated("l", [[7, 8, 9]], 10)
    daemon.die()
    attachment.daemon = MemoryDaemon(LAYOUT, blocks=8, incarnation=2)
    step = scheduler.step(IDLE)  # type: ignore[arg-type]
    assert step.incarnation == 2
    assert [load.incarnation for load in step.loads] == [1]


def test_a_send_is_ended_by_its_handoff(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    scheduler.on_new_request(send_request(daemon))
    assert scheduler.matched_tokens("s", 0) == (0, False)
    daemon.clients[0].deliver(SendEnded(request_id="", handoff_id=HANDOFF, reason="lease expired"))
    scheduler.step(IDLE)  # type: ignore[arg-type]
    assert [(m.side, m.reason) for m in daemon.let_go] == [("send", "lease expired")]


@pytest.mark.parametrize("request_of", [send_request, load_request])
def test_one_handle_serves_one_request(daemon: MemoryDaemon, scheduler: SchedulerSide, request_of: Any) -> None:
    """Several answers to one prompt, or several prompts in one POST, all come with its handle."""
    daemon.hold_back = True
    first, second = request_of(daemon), request_of(daemon)
    second.request_id = "second"
    scheduler.on_new_request(first)
    scheduler.on_new_request(second)
    assert len(daemon.received) == 1
    assert scheduler.matched_tokens("second", 0) == (0, False)
    assert scheduler.finished("second") is None
    assert scheduler.matched_tokens(first.request_id, 0) == (None, False)
    scheduler.finished(first.request_id)
    assert [letting.handoff_id for letting in daemon.let_go] == [HANDOFF]


def test_live_handoffs_are_renewed_once_a_second_and_idleness_is_told(
    daemon: MemoryDaemon, scheduler: SchedulerSide, clock: Clock
) -> None:
    request = send_request(daemon)
    scheduler.on_new_request(request)
    request.block_ids = [1, 2, 3]
    running = Scheduled({"s": 4}, {"s": request})
    scheduler.step(IDLE)  # type: ignore[arg-type]
    scheduler.step(running)  # type: ignore[arg-type]
    clock.now += 1.0
    scheduler.step(running)  # type: ignore[arg-type]
    scheduler.step(IDLE)  # type: ignore[arg-type]
    renewals = [m for m in daemon.received if isinstance(m, Renew)]
    assert [(m.handoff_ids, m.running, m.waiting) for m in renewals] == [
        ([HANDOFF], 0, 1),
        ([HANDOFF], 1, 0),
        ([HANDOFF], 0, 0),
    ]


def test_orders_end_with_the_load_that_they_were_for(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    """Else the next request of this name would be dropped by the abort of the one before."""
    scheduler.on_new_request(send_request(daemon))
    scheduler.on_new_request(load_request(daemon))
    assert scheduler.matched_tokens("l", 0) == (10, True)
    scheduler.allocated("l", [[7, 8, 9]], 10)
    scheduler.step(IDLE)  # type: ignore[arg-type]
    scheduler.finished("l")
    scheduler.reported(Report(1, {"l": LoadResult(True, 3, 0, "", [])}))
    step = scheduler.step(IDLE)  # type: ignore[arg-type]
    assert (step.dropping, step.finishing) == ([], [])


@pytest.mark.parametrize("evicted", [True, False])
def test_a_load_is_there_until_the_engine_has_blocks(
    daemon: MemoryDaemon, scheduler: SchedulerSide, evicted: bool
) -> None:
    """Its own cache may have all when vLLM asks, and none of it when there is room for the request."""
    scheduler.on_new_request(send_request(daemon))
    scheduler.on_new_request(load_request(daemon))
    assert scheduler.matched_tokens("l", 10) == (0, False)
    assert daemon.let_go == []
    if evicted:
        assert scheduler.matched_tokens("l", 0) == (10, True)
        scheduler.allocated("l", [[7, 8, 9]], 10)
        assert len(scheduler.step(IDLE).loads) == 1  # type: ignore[arg-type]
    else:
        scheduler.allocated("l", [[7, 8, 9]], 0)
        assert [(m.side, m.ok, m.reason) for m in daemon.let_go] == [("load", True, "the engine has it all")]


def test_prompts_that_no_message_can_name_are_served_without_pdx(
    daemon: MemoryDaemon, scheduler: SchedulerSide
) -> None:
    request = send_request(daemon)
    request.prompt_token_ids = [0] * ((BLOCKS_MAX * BLOCK_TOKENS) + 1)
    scheduler.on_new_request(request)
    assert scheduler.matched_tokens("s", 0) == (0, False)
    assert daemon.received == []
    assert [scheduler.take_counts() for _ in range(2)] == [{"too_large": 1}, {}]


def test_long_names_are_not_told(daemon: MemoryDaemon, scheduler: SchedulerSide) -> None:
    for number, request in enumerate((send_request(daemon), send_request(daemon), load_request(daemon))):
        request.request_id = "x" * 300 + str(number)
        request.kv_transfer_params["pdx_handle"] = daemon.handle(max(1, number))
        scheduler.on_new_request(request)
    names = [message.request_id for message in daemon.received if isinstance(message, OpenSend | OpenLoad)]
    assert len(set(names)) == len(names) == 2, "the second has the first one's handle"
    assert max(map(len, names)) < 300
    assert scheduler.matched_tokens("x" * 300 + "0", 0) == (0, False)
    for number in range(3):
        scheduler.finished("x" * 300 + str(number))
    assert not scheduler._names._ours and not scheduler._names._theirs
