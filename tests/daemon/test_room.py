"""Who waits for room, and what is done for it in each turn of the loop: one daemon without sockets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from one_host import BUDGETS, PAGES, Host, engine, handle, name

from pdx.buffer.headers import Headers
from pdx.buffer.lease import Owner
from pdx.buffer.store import Store
from pdx.daemon.handoffs import LOOK_S
from pdx.daemon.receiving import spans_of
from pdx.handoff import sender
from pdx.layout import PageLayout
from pdx.transport.api import Span
from pdx.transport.spans import SpanSet
from pdx.wire import Filled, FilledEntry, LetGo, OpenSend, SendEnded, SendOpened

LARGE = [bytes([n]) for n in range(20)]  # of the 30 blocks that there is room for
OTHER = [b"x" + part for part in LARGE]


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def claims(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each claim was for."""
    asked: list[int] = []
    claim: Callable = host.store.claim

    def counted(*about: object, **more: object) -> object:
        asked.append(len(about[3]))  # type: ignore[arg-type]
        return claim(*about, **more)

    monkeypatch.setattr(host.store, "claim", counted)
    return asked


def test_who_waits_looks_again_only_when_there_may_be_room(host: Host, claims: list[int]) -> None:
    host.send(0, LARGE)
    host.send(1, OTHER)
    tries = len(claims)
    for _ in range(100):
        host.tick(2 * LOOK_S / 100)
    assert (len(claims), host.handoffs.reservations_waiting) == (tries, 1)
    host.handoffs.let_go("P", LetGo(handoff_id=name(0), side="send", fence=1, ok=False), host.now)
    host.tick()
    assert host.handoffs.reservations_waiting == 0
    assert [type(message) for message in host.heard["P"]] == [SendOpened, SendEnded, SendOpened]


def test_who_waits_looks_again_when_some_of_it_has_come(host: Host, claims: list[int]) -> None:
    """What is committed meanwhile need not be claimed."""
    host.send(0, LARGE)
    host.send(1, [*LARGE[:19], *OTHER[:8]])
    assert host.handoffs.reservations_waiting == 1
    tries = len(claims)
    host.fill(list(range(20)))
    assert len(claims) > tries
    assert host.handoffs.reservations_waiting == 0


def test_who_waits_takes_the_room_of_what_has_become_cache(host: Host) -> None:
    host.send(0, LARGE)
    host.send(1, OTHER)
    host.fill(list(range(20)))
    host.handoffs.let_go("P", LetGo(handoff_id=name(0), side="send", fence=1, ok=True), host.now)
    assert host.ask(0, hashes=LARGE) == "granted"
    host.tick()
    assert host.handoffs.reservations_waiting == 1, "decode's engine holds it"
    host.let_go(ok=True)
    assert host.handoffs.reservations_waiting == 0


def test_the_next_in_line_looks_at_once_when_the_head_has_left(host: Host, claims: list[int]) -> None:
    host.send(0, LARGE)
    host.send(1, OTHER)
    host.send(2, OTHER[:5])
    assert host.handoffs.reservations_waiting == 2
    host.handoffs.cancel(name(1), 1, "client left", host.now)
    host.tick()
    assert host.handoffs.reservations_waiting == 0


def test_who_waits_in_vain_is_told_when_its_budget_is_over(host: Host) -> None:
    host.send(0, LARGE)
    host.send(1, OTHER)
    host.tick(BUDGETS.grant_s)
    host.tick(2 * LOOK_S)
    assert [type(message) for message in host.heard["P"]][-1] is SendEnded
    assert host.handoffs.reservations_waiting == 0


def test_a_long_prompt_that_is_whole_when_it_is_granted_lands_put_by_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a daemon a put ends at once and brings the next: a thousand of them are no recursion."""
    monkeypatch.setattr(sender, "OPEN_BYTES", 1)
    host, hashes = Host(extents=50), [b"%d" % n for n in range(600)]
    message = OpenSend(request_id="p", handle=handle(0), block_hashes=hashes, prompt_tokens=0, tail_hash=b"")
    host.handoffs.open_send(engine("P"), message, host.now)
    for layer in range(PAGES.layers):  # before RESERVE has been heard
        entry = FilledEntry(handoff_id=name(0), blocks=list(range(600)))
        filled = Filled(step=1, step_started_ns=0, layer=layer, filled_ns=0, entries=[entry])
        host.handoffs.filled("P", filled, host.now)
    host.tick()
    host.handoffs.let_go("P", LetGo(handoff_id=name(0), side="send", fence=1, ok=True), host.now)
    host.tick()
    assert host.counters["pages_landed"] == 1200
    assert host.counters["sends_settled"] == 1


@pytest.mark.parametrize("page_bytes", [1000, 4096])
@pytest.mark.parametrize("ready", [0, 3])
def test_a_window_is_all_pages_of_the_fresh_blocks_and_nothing_else(page_bytes: int, ready: int) -> None:
    """Pages that do not fill their unit leave padding, into which nobody may put."""
    pages = PageLayout(layers=3, page_bytes=page_bytes, chunk_blocks=4)
    arena = Headers(memoryview(bytearray(4096 + 4 * (256 << 10))))
    store = Store(arena, extent_bytes=256 << 10, handoff_share=0.9)  # type: ignore[arg-type]
    owner, hashes = Owner("wire", "w"), [b"%d" % n for n in range(11)]
    if ready:
        kept = store.claim(owner, b"n", pages, hashes[2 : 2 + ready], tail=False, now=0.0, ttl_s=1.0)
        assert kept is not None
        store.commit(kept)
    claim = store.claim(owner, b"n", pages, hashes, tail=True, now=0.0, ttl_s=1.0)
    assert claim is not None
    places = [claim.places[block] for block in claim.fresh]
    each = [Span(place.page_offset(pages, layer), page_bytes) for place in places for layer in range(pages.layers)]
    assert SpanSet(spans_of(claim)).spans() == SpanSet(each).spans()
    assert len(spans_of(claim)) == len(claim.fresh_slots) < len(claim.fresh)


def test_the_log_says_why_a_handoff_failed_unless_a_router_has_ended_it(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """It is where alerts send people."""
    caplog.set_level("INFO")
    host.send(0)
    host.send(1)
    host.handoffs.cancel(name(0), 1, "client_gone", host.now)
    host.handoffs.engine_failing("P", host.now)
    host.tick()
    told = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    reasons = ("prefill engine died", "prefill: prefill engine died")  # one for each half
    assert told == [f"handoff {name(1).hex()} failed: {reason!r}" for reason in reasons]
