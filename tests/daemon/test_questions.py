"""When a decode engine's question is answered, and how: one daemon without sockets, both engines on its host."""

from __future__ import annotations

from dataclasses import replace

import pytest
from one_host import BUDGETS, HASHES, Host, engine, handle, name
from test_steering import SPACE

from pdx.daemon import questions
from pdx.keys import tenant_of
from pdx.wire import Filled, FilledEntry, LetGo, LookUp, OpenLoad, OpenSend, SendEnded, SendOpened


@pytest.fixture
def host() -> Host:
    return Host()


def test_an_early_question_is_answered_with_the_first_page(host: Host) -> None:
    assert host.ask() == "wait"
    host.tick(BUDGETS.grant_s - 0.1)
    assert host.told() == []
    host.send()
    host.tick(0.2)
    assert host.told() == [], "reserved, and no page yet"
    host.fill([0], range(1))
    assert host.told() == [("granted", 3)]
    host.fill([0], range(1, 2))
    host.fill([1, 2])
    host.let_go(ok=True, pages=6)
    assert host.told() == []


def test_one_that_came_after_prefill_is_answered_before(host: Host) -> None:
    assert host.ask(early=False) == "wait"
    host.send()
    assert host.told() == [], "it asks again"
    assert host.ask(early=False) == "granted"


def test_an_early_question_finds_pages_that_are_here(host: Host) -> None:
    host.send()
    host.fill([0, 1, 2])
    assert host.ask() == "granted"


def test_nothing_to_come_is_as_good_as_the_first_page(host: Host) -> None:
    host.prefill()
    assert host.ask() == "granted"
    host.let_go(ok=True)
    assert host.ask(1) == "wait"
    host.send(1)
    host.tick()
    assert host.told() == [("granted", 3)], "every block was cached"


def test_a_handoff_that_stays_unknown_is_absent_after_the_grant_budget(host: Host) -> None:
    assert host.ask() == "wait"
    host.tick(BUDGETS.grant_s - 0.1)
    assert host.ask() == "wait", "to ask again does not start the wait again"
    host.tick(0.2)
    assert host.told() == [("absent", 0)]
    assert host.ask(1, early=False) == "wait"
    host.tick(questions.UNKNOWN_HANDOFF_WAIT_S + 0.1)
    assert host.ask(1, early=False) == "absent"


@pytest.mark.parametrize("reserved", [False, True])
def test_the_router_s_cancel_answers_at_once(host: Host, reserved: bool) -> None:
    assert host.ask() == "wait"
    if reserved:
        host.send()
    host.handoffs.cancel(name(0), 1, "prefill failed", host.now)
    host.tick()
    assert host.told() == [("absent", 0)]
    assert host.handoffs.describe() == []


def test_prefill_s_failure_answers_at_once_with_what_the_cache_has(host: Host) -> None:
    host.prefill()
    assert host.ask() == "granted"
    host.let_go(ok=True)
    longer = [*HASHES, b"four"]
    assert host.ask(1, hashes=longer) == "wait"
    host.send(1, longer)
    host.handoffs.let_go("P", LetGo(handoff_id=name(1), side="send", fence=1, ok=False, reason="aborted"), host.now)
    host.tick()
    assert host.told() == [("granted", 3)]


def test_a_full_arena_is_waited_for(host: Host) -> None:
    large = [bytes([n]) for n in range(20)]  # of 30
    host.send(0, large)
    assert isinstance(host.heard["P"][0], SendOpened)
    other = [b"x" + part for part in large]
    assert host.ask(1, hashes=other) == "wait"
    host.send(1, other)
    host.tick(BUDGETS.grant_s / 2)
    assert host.told() == []
    host.handoffs.cancel(name(0), 1, "over", host.now)
    host.handoffs.let_go("P", LetGo(handoff_id=name(0), side="send", fence=1, ok=False), host.now)
    host.tick()
    assert host.told() == []
    host.fill([0], number=1)
    assert host.told() == [("granted", len(other))]


def test_an_engine_that_waits_no_longer_ends_its_handoff(host: Host) -> None:
    assert host.ask() == "wait"
    host.send()
    host.let_go(ok=False, reason="request ended")
    assert isinstance(host.heard["P"][-1], SendEnded)
    host.fill([0])
    assert host.told() == []
    host.handoffs.let_go("P", LetGo(handoff_id=name(0), side="send", fence=1, ok=False), host.now)
    host.tick()
    assert host.store.stats()["leases"] == {"live": 0, "quarantined": 0}
    assert host.handoffs.describe() == []


def test_a_dead_engine_is_not_answered(host: Host) -> None:
    assert host.ask() == "wait"
    host.handoffs.engine_failing("D", host.now)
    host.prefill()
    host.tick(BUDGETS.grant_s + 0.1)
    assert host.told() == []
    assert not any(host.store.stats()["leases"].values())


def test_questions_are_kept_up_to_a_bound_and_asked_again_beyond(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "EARLY_MAX", 1)
    assert [host.ask(0), host.ask(1)] == ["wait", "wait"]
    host.prefill(1)
    assert host.told() == []
    assert host.ask(1) == "granted"


@pytest.mark.parametrize("spoilt", [[1], [1, 1, 7, -1, 1 << 40]])
def test_a_spoilt_block_is_found_no_more(host: Host, spoilt: list[int]) -> None:
    host.prefill()
    assert host.ask() == "granted"
    host.let_go(ok=True)
    host.handoffs.cancel(name(1), 1, "prefill failed", host.now)
    assert host.ask(1) == "granted", "from the cache"
    host.let_go(1, ok=False, reason="1 pages of layer 0 differ in checksum", pages=3, spoilt=spoilt)
    assert host.counters["blocks_spoilt"] == 1
    host.tick()
    host.handoffs.cancel(name(2), 1, "prefill failed", host.now)
    assert host.ask(2) == "granted"
    host.let_go(2, ok=True)
    host.send(3)
    opened = host.heard["P"][-1]
    assert isinstance(opened, SendOpened)
    assert [place is None for place in opened.places] == [True, False, True], "filled anew"


def test_a_block_found_wrong_while_it_came_is_found_no_more(host: Host) -> None:
    """Its last layer comes in the same turn, before the handoff that fails for it has been broken off."""
    host.send()
    host.fill([0, 1, 2], range(1))
    assert host.ask(early=False) == "granted"
    spoilt = LetGo(handoff_id=name(0), side="load", fence=0, ok=False, reason="a page differs", spoilt=[0])
    host.handoffs.let_go("D", spoilt, host.now)
    last = FilledEntry(handoff_id=name(0), blocks=[0, 1, 2])
    host.handoffs.filled("P", Filled(step=1, step_started_ns=0, layer=1, filled_ns=0, entries=[last]), host.now)
    host.tick()
    assert [spot is None for spot in host.store.index.find(SPACE, HASHES)] == [True, False, False]
    assert host.counters["blocks_spoilt"] == 1


def test_a_slot_whose_last_block_was_spoilt_is_free(host: Host) -> None:
    host.prefill()
    assert host.ask() == "granted"
    host.let_go(ok=False, spoilt=[0, 1, 2])
    assert host.counters["blocks_spoilt"] == 3
    assert host.store.stats()["used_bytes"] == 0


def test_pages_of_another_tenant_or_of_other_weights_are_no_answer(host: Host) -> None:
    """Nor are they lost to the engine whose they are."""
    host.send()
    host.fill([0, 1, 2])
    about = {"request_id": "d", "handle": handle(0), "block_hashes": HASHES, "prompt_tokens": 0, "tail_hash": b""}
    host.handoffs.open_load(engine("D"), OpenLoad(**about, tenant=tenant_of("bob")), host.now)  # type: ignore[arg-type]
    later = engine("D")
    later.info = later.info.at("abcd")
    host.handoffs.open_load(later, OpenLoad(**about), host.now)  # type: ignore[arg-type]
    assert host.told() == [("absent", 0)] * 2
    assert host.ask() == "granted"
    host.let_go(ok=True)


def test_nothing_is_reserved_for_an_engine_that_is_not_complete(host: Host) -> None:
    """Its workers are here, its scheduler has yet to say of which epoch its weights are."""
    half = engine("D")
    half.scheduler = None
    desk = host.handoffs._desk
    desk.ports = replace(desk.ports, engine=lambda name: half if name == "D" else engine(name))
    host.send()
    host.tick()
    ended = host.heard["P"][-1]
    assert isinstance(ended, SendEnded)
    assert "not attached" in ended.reason


def test_only_the_engine_that_a_handle_names_sends_by_it(host: Host) -> None:
    host.heard["X"] = []
    message = OpenSend(request_id="p", handle=handle(0), block_hashes=HASHES, prompt_tokens=0, tail_hash=b"")
    host.handoffs.open_send(engine("X"), message, host.now)
    assert [type(heard) for heard in host.heard["X"]] == [SendEnded]
    assert host.counters["handles_refused"] == 1
    host.send()
    assert [type(heard) for heard in host.heard["P"]] == [SendOpened], "it has not used it up"


def test_a_look_up_may_not_take_a_handoff_s_name_to_keep_its_slots(host: Host) -> None:
    """The second lease under one name would be on no book, and never end."""
    host.prefill()
    ask = LookUp(request_id="d", handoff_id=name(1), block_hashes=HASHES)
    host.handoffs.look_up(engine("D"), ask, host.now)
    assert host.told() == [("granted", 3)]
    host.prefill(1)
    assert host.ask(1) == "absent"
    host.let_go(1, ok=True)
    host.tick(60.0)
    assert not host.store.leases
