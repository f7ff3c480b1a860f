"""What look-ups find for requests that wait in an engine's queue: it keeps no room, and is found anew at their turn."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryAttachment, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYOUT, Request, Scheduled

from pdx.engine.link import Link
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.layout import Place
from pdx.wire import LoadEnded, LoadOpened, LookUp, OpenLoad, Renew

IDLE = Scheduled({}, {})


def own_request(number: int = 0) -> Any:
    return Request(f"own {number}", list(range(10)))


@pytest.fixture
def keeping(daemon: MemoryDaemon, clock: Clock) -> SchedulerSide:
    link = Link(MemoryAttachment(daemon))  # type: ignore[arg-type]
    return SchedulerSide(link, role="both", layout=LAYOUT, block_tokens=BLOCK_TOKENS, offload="all", clock=clock)


def looked_up(daemon: MemoryDaemon) -> list[LookUp]:
    return [message for message in daemon.received if isinstance(message, LookUp)]


def found(daemon: MemoryDaemon, message: LookUp) -> None:
    places = [Place(4096, 1, 0, 8192, 1)]
    daemon.clients[0]._inbox.clear()
    daemon.clients[0].deliver(
        LoadOpened(request_id=message.request_id, handoff_id=message.handoff_id, status="granted", places=places)
    )
    daemon.hold_back = False


def test_what_is_found_for_a_request_that_waits_is_not_held_and_looked_up_anew_at_its_turn(
    daemon: MemoryDaemon, keeping: SchedulerSide, clock: Clock
) -> None:
    daemon.hold_back = True
    keeping.on_new_request(own_request())
    (first,) = looked_up(daemon)
    found(daemon, first)
    clock.now += 2.0
    keeping.step(IDLE)  # type: ignore[arg-type]
    renewed = [name for message in daemon.received if isinstance(message, Renew) for name in message.handoff_ids]
    assert renewed == []
    daemon.clients[0].deliver(LoadEnded(handoff_id=first.handoff_id, reason="others wait for room"))
    keeping.step(IDLE)  # type: ignore[arg-type]
    assert [(m.handoff_id, m.fence) for m in daemon.let_go] == [(first.handoff_id, 0)]
    assert len(looked_up(daemon)) == 1, "its turn has not come"
    daemon.hold_back = True
    assert keeping.matched_tokens("own 0", 0) == (None, False)
    _, second = looked_up(daemon)
    assert second.block_hashes == first.block_hashes
    assert second.handoff_id != first.handoff_id
    found(daemon, second)
    keeping.step(IDLE)  # type: ignore[arg-type]
    assert keeping.matched_tokens("own 0", 0) == (BLOCK_TOKENS, True)
    keeping.allocated("own 0", [[7, 8, 9]], BLOCK_TOKENS)
    clock.now += 2.0
    step = keeping.step(IDLE)  # type: ignore[arg-type]
    assert [load.request_id for load in step.loads] == ["own 0"]
    renewed = [name for message in daemon.received if isinstance(message, Renew) for name in message.handoff_ids]
    assert renewed == [second.handoff_id], "what is being loaded is held"


def test_a_request_that_is_admitted_before_the_answer_holds_nothing(
    daemon: MemoryDaemon, keeping: SchedulerSide, clock: Clock
) -> None:
    """vLLM does not wait for a request that is to read no cache."""
    daemon.hold_back = True
    request = own_request()
    request.kv_transfer_params = {"pdx_handle": daemon.handle(), "do_remote_prefill": True}
    request.skip_reading_prefix_cache = True
    keeping.on_new_request(request)
    assert not any(isinstance(message, LookUp | OpenLoad) for message in daemon.received)
    keeping.on_new_request(own_request(1))
    keeping.allocated("own 1", [[7, 8, 9]], 0)
    (asked,) = looked_up(daemon)
    found(daemon, asked)
    clock.now += 2.0
    keeping.step(IDLE)  # type: ignore[arg-type]
    assert {m.handoff_id for m in daemon.let_go if m.side == "load"} == {asked.handoff_id}
    renewed = [name for message in daemon.received if isinstance(message, Renew) for name in message.handoff_ids]
    assert renewed == []


def test_a_request_whose_finds_were_given_up_may_end_before_its_turn(
    daemon: MemoryDaemon, keeping: SchedulerSide
) -> None:
    daemon.hold_back = True
    keeping.on_new_request(own_request())
    (first,) = looked_up(daemon)
    found(daemon, first)
    daemon.clients[0].deliver(LoadEnded(handoff_id=first.handoff_id, reason="others wait for room"))
    keeping.step(IDLE)  # type: ignore[arg-type]
    keeping.finished("own 0")
    assert [m.handoff_id for m in daemon.let_go if m.side == "load"] == [first.handoff_id], "once"
