"""Look-ups and offers of requests without a handle: answered at once, from memory, and never in a handoff's way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from one_host import HASHES, PAGES, Host, engine, name

from pdx.layout import Place
from pdx.wire import Keep, LetGo, LoadEnded, LoadOpened, LookUp, SendEnded, SendOpened

REQUESTS = itertools.count()
MINE, OTHER = b"m" * 16, b"o" * 16


@pytest.fixture
def host() -> Host:
    return Host()


def heard(host: Host) -> Any:
    (message,) = host.heard["P"]
    host.heard["P"].clear()
    return message


def look_up(host: Host, hashes: list[bytes] = HASHES, called: bytes = MINE) -> list[Place]:
    host.handoffs.look_up(engine("P"), LookUp(request_id="r", handoff_id=called, block_hashes=hashes), host.now)
    answer = heard(host)
    assert isinstance(answer, LoadOpened)
    assert (answer.status == "granted") == bool(answer.places)
    return answer.places


def keep(host: Host, hashes: list[bytes] = HASHES, called: bytes = MINE, request: str = "") -> SendOpened | SendEnded:
    """`request`: of which these are the next blocks; else of one that nothing else is kept of."""
    message = Keep(request_id=request or f"r{next(REQUESTS)}", handoff_id=called, block_hashes=hashes)
    host.handoffs.keep(engine("P"), message, host.now)
    answer: SendOpened | SendEnded = heard(host)
    if isinstance(answer, SendOpened):  # and the engine fills them
        for place in filter(None, answer.places):
            host.store.arena.set_watermark(place.header_offset, PAGES.layers)
    return answer


def let_go(host: Host, called: bytes = MINE, side: str = "send", *, ok: bool = True, **about: Any) -> None:
    host.handoffs.let_go("P", LetGo(handoff_id=called, side=side, fence=1, ok=ok, **about), host.now)  # type: ignore[arg-type]
    host.tick()


def leases(host: Host) -> int:
    return len(host.store.leases)


def test_what_was_kept_is_found_from_its_beginning_on(host: Host) -> None:
    assert look_up(host) == []
    opened = keep(host)
    assert isinstance(opened, SendOpened) and None not in opened.places
    assert look_up(host) == [], "not whole yet"
    let_go(host)
    assert look_up(host) == opened.places
    let_go(host, side="load")
    assert look_up(host, [HASHES[0], b"else", HASHES[2]]) == opened.places[:1]
    let_go(host, side="load")
    assert look_up(host, HASHES[1:]) == opened.places[1:], "hashes name all that comes before them"
    let_go(host, side="load")
    assert leases(host) == 0
    assert host.counters["lookup_hit_blocks"] == 6


def test_blocks_with_a_page_missing_are_not_kept(host: Host) -> None:
    """Whatever the engine says: who found them would wait for a page that never comes."""
    opened = keep(host)
    assert isinstance(opened, SendOpened) and opened.places[1] is not None
    host.store.arena.set_watermark(opened.places[1].header_offset, PAGES.layers - 1)
    let_go(host)
    assert look_up(host) == []
    assert leases(host) == 0
    assert "blocks_kept" not in host.counters


def test_blocks_with_one_of_them_twice_are_not_kept(host: Host) -> None:
    assert isinstance(keep(host, [HASHES[0], HASHES[0]]), SendEnded)
    assert leases(host) == 0 and not host.store.slots


def test_only_what_is_new_is_to_be_saved(host: Host) -> None:
    keep(host, HASHES[:2])
    let_go(host)
    opened = keep(host)
    assert isinstance(opened, SendOpened)
    assert [place is None for place in opened.places] == [True, True, False]
    let_go(host)
    assert len(look_up(host)) == 3


def test_what_was_not_saved_is_not_found(host: Host) -> None:
    keep(host)
    let_go(host, ok=False)
    assert look_up(host) == []
    assert leases(host) == 0 and not host.store.slots


def test_an_engine_that_is_too_late_has_kept_nothing(host: Host) -> None:
    """Its slots are in quarantine until it says that it is done; what it says then comes too late."""
    keep(host)
    host.tick(31.0)
    assert isinstance(heard(host), SendEnded)
    assert host.store.slots
    let_go(host, ok=True)
    assert look_up(host) == []
    assert not host.store.slots


def test_a_load_is_asked_for_when_its_lease_is_over(host: Host) -> None:
    keep(host)
    let_go(host)
    look_up(host)
    host.tick(31.0)
    assert isinstance(heard(host), LoadEnded)
    let_go(host, side="load", ok=False)
    assert leases(host) == 0


def test_a_spoilt_block_is_found_no_more(host: Host) -> None:
    keep(host)
    let_go(host)
    look_up(host)
    let_go(host, side="load", ok=False, spoilt=[1])
    assert len(look_up(host)) == 1


def test_no_name_is_used_twice(host: Host) -> None:
    keep(host)
    answer = keep(host)
    assert isinstance(answer, SendEnded) and "taken" in answer.reason
    let_go(host)
    assert len(look_up(host)) == 3
    assert look_up(host) == [], "the first is not over"
    let_go(host, side="load")
    host.send()  # a handoff's
    host.heard["P"].clear()
    assert isinstance(keep(host, [b"new"], called=name(0)), SendEnded)


def test_offers_take_no_room_from_handoffs(host: Host) -> None:
    blocks = host.store.extents.capacity(PAGES)
    for number in range(2):
        hashes = [b"%d/%d" % (number, n) for n in range(int(blocks * 0.6))]
        host.send(number, hashes)
    assert host.handoffs.reservations_waiting
    host.heard["P"].clear()
    answer = keep(host, [b"small"])
    assert isinstance(answer, SendEnded) and "full" in answer.reason
    assert host.counters["keeps_refused"] == 1


def test_what_look_ups_have_found_gives_way_to_handoffs(host: Host) -> None:
    """Requests may wait in an engine's queue for minutes: it asks again when their turn has come."""
    blocks = host.store.extents.capacity(PAGES)
    mine = [b"mine %d" % n for n in range(int(blocks * 0.6))]
    keep(host, mine)
    let_go(host)
    assert len(look_up(host, mine)) == len(mine)
    host.send(hashes=[b"handoff %d" % n for n in range(int(blocks * 0.8))])
    assert host.handoffs.reservations_waiting
    ended = [message for message in host.heard["P"] if isinstance(message, LoadEnded)]
    assert [(message.handoff_id, message.reason) for message in ended] == [(MINE, "others wait for room")]
    host.tick()
    assert [m for m in host.heard["P"] if isinstance(m, LoadEnded)] == ended, "it is told once"
    let_go(host, side="load")
    host.tick()
    assert not host.handoffs.reservations_waiting


def test_what_never_fits_is_refused(host: Host) -> None:
    blocks = host.store.extents.capacity(PAGES)
    answer = keep(host, [b"%d" % n for n in range(blocks + 1)])
    assert isinstance(answer, SendEnded) and "never fits" in answer.reason


def test_an_engine_that_died_leaves_nothing(host: Host) -> None:
    keep(host)
    let_go(host)
    look_up(host)
    keep(host, [b"more"], OTHER)
    host.handoffs.engine_gone("P", host.now)
    assert leases(host) == 0
    assert len(look_up(host)) == 3, "what it kept stays"


def test_a_handoff_pushes_what_was_kept_without_the_engine(host: Host) -> None:
    keep(host)
    let_go(host)
    host.send()
    opened = next(message for message in host.heard["P"] if isinstance(message, SendOpened))
    assert opened.places == [None, None, None]
    assert host.ask() == "granted"
