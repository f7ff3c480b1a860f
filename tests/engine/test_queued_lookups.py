"""What look-ups find for requests that wait in an engine's queue: it keeps no room, and is found anew at their turn."""

from __future__ import annotations

from typing import Any, Literal

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryAttachment, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYOUT, Request, Scheduled

from pdx.engine.link import Link
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.unread import UNREAD_MAX
from pdx.layout import Place
from pdx.wire import Keep, LoadEnded, LoadOpened, LookUp, OpenLoad, Renew

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


def lapse(daemon: MemoryDaemon, keeping: SchedulerSide, requests: int) -> None:
    """So many requests wait in the queue, and have had to give up what was found for them."""
    for number in range(requests):
        keeping.on_new_request(own_request(number))
    for message in looked_up(daemon)[-requests:]:
        answer(daemon, message)
        daemon.clients[0].deliver(LoadEnded(handoff_id=message.handoff_id, reason="others wait for room"))
    daemon.hold_back = False
    keeping.step(IDLE)  # type: ignore[arg-type]
    daemon.hold_back = True


def answer(daemon: MemoryDaemon, message: LookUp, status: Literal["granted", "absent"] = "granted") -> None:
    places = [Place(4096, 1, 0, 8192, 1)] if status == "granted" else []
    daemon.clients[0].deliver(
        LoadOpened(request_id=message.request_id, handoff_id=message.handoff_id, status=status, places=places)
    )


@pytest.fixture
def mute(daemon: MemoryDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers what the test has it answer, and no look-up by itself."""
    monkeypatch.setattr(daemon, "_look_up", lambda *_: None)


@pytest.mark.usefixtures("mute")
def test_of_all_that_have_lapsed_few_are_looked_up_at_once(
    daemon: MemoryDaemon, keeping: SchedulerSide, clock: Clock
) -> None:
    """vLLM asks for all of its queue in a step in which the first of them have no answer yet."""
    lapse(daemon, keeping, 30)
    before = len(looked_up(daemon))
    for _ in range(3):
        clock.now += 0.001
        assert {keeping.matched_tokens(f"own {number}", 0)[0] for number in range(30)} == {None}
        keeping.step(IDLE)  # type: ignore[arg-type]
    first, second = looked_up(daemon)[before:]
    clock.now += 0.015
    answer(daemon, first, "absent")
    answer(daemon, second)
    daemon.hold_back = False
    assert keeping.matched_tokens("own 0", 0) == (0, False)
    assert keeping.matched_tokens("own 1", 0) == (BLOCK_TOKENS, True)
    clock.now += 10.0
    assert keeping.matched_tokens("own 2", 0) == (None, False), "its time begins with its question"
    assert len(looked_up(daemon)) == before + 3


@pytest.mark.usefixtures("mute")
def test_a_daemon_that_does_not_answer_one_is_not_awaited_for_others(
    daemon: MemoryDaemon, keeping: SchedulerSide, clock: Clock
) -> None:
    lapse(daemon, keeping, 30)
    before = len(looked_up(daemon))
    assert {keeping.matched_tokens(f"own {number}", 0)[0] for number in range(20)} == {None}
    clock.now += 1.0
    assert {keeping.matched_tokens(f"own {number}", 0) for number in range(20)} == {(0, False)}
    (late, _) = looked_up(daemon)[before:]
    answer(daemon, late, "absent")
    daemon.hold_back = False
    keeping.step(IDLE)  # type: ignore[arg-type]
    assert keeping.matched_tokens("own 20", 0) == (None, False), "it has been heard again"


@pytest.mark.usefixtures("mute")
def test_a_daemon_that_reads_nothing_is_sent_no_more_than_a_few_look_ups(
    daemon: MemoryDaemon, keeping: SchedulerSide
) -> None:
    daemon.hold_back = True
    for number in range(10 * UNREAD_MAX):
        keeping.on_new_request(own_request(number))
    assert len(looked_up(daemon)) == UNREAD_MAX
    last = f"own {10 * UNREAD_MAX - 1}"
    answer(daemon, looked_up(daemon)[10], "absent")
    daemon.hold_back = False
    keeping.step(IDLE)  # type: ignore[arg-type]
    assert keeping.matched_tokens(last, 0) == (None, False)
    assert looked_up(daemon)[-1].request_id == last, "it has read: what could not be asked is asked at its turn"
    for number in range(10):
        keeping.on_new_request(own_request(1000 + number))
    assert len(looked_up(daemon)) == UNREAD_MAX + 11
    assert keeping.matched_tokens("own 400", 0) == (0, False), "nobody waits for a question that can't be sent"


def test_a_daemon_that_reads_nothing_is_offered_no_more_than_a_few_blocks(
    daemon: MemoryDaemon, keeping: SchedulerSide
) -> None:
    """What is not offered in one step is in a later one."""
    requests = {f"own {number}": own_request(number) for number in range(2 * UNREAD_MAX)}
    for name, request in requests.items():
        keeping.on_new_request(request)
        keeping.step(IDLE)  # type: ignore[arg-type]
        keeping.allocated(name, [[7, 8, 9]], 0)
        request.block_ids = [7, 8, 9]
    running = Scheduled(dict.fromkeys(requests, 1), requests)
    for is_stopped, offers in ((True, UNREAD_MAX), (True, UNREAD_MAX), (False, 2 * UNREAD_MAX)):
        daemon.hold_back = is_stopped
        keeping.step(running)  # type: ignore[arg-type]
        offered = {message.request_id for message in daemon.received if isinstance(message, Keep)}
        assert len(offered) == offers
