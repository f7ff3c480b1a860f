"""Which routers a daemon tells of its engines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest
import zmq
from one_host import HERE, KEY, engine

from pdx.buffer.index import Index
from pdx.curve import lock
from pdx.daemon.announcer import ROUTERS_MAX, SILENT_ROUTER_S, UNNAMED_S, Announcer
from pdx.daemon.holdings import HoldingsTeller
from pdx.daemon.sessions import Engine
from pdx.wire import MAGIC, WIRE_VERSION, CancelHandoff, encode

WAIT_MS = 10_000


@pytest.fixture
def counters() -> Counter[str]:
    return Counter()


@pytest.fixture
def announcer(counters: Counter[str]) -> Iterator[Announcer]:
    with zmq.Context() as context:
        teller = HoldingsTeller(HERE, Index(), None)
        announcer = Announcer(context, zmq.Poller(), HERE, counters, cluster_key=KEY, holdings=teller)
        yield announcer
        announcer.close()


def naming(routers: list[str]) -> Engine:
    named = engine("P")
    named.routers = frozenset(routers)
    return named


def tick(announcer: Announcer, routers: list[str], now: float) -> set[str]:
    """Whom it tells."""
    announcer.tick([naming(routers)], reservations_waiting=0, links=list, now=now)
    return set(announcer._sockets)


def test_routers_that_nobody_names_any_more_make_room(
    announcer: Announcer, counters: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    """They move with their pods, and engines come and go: a daemon lives longer than either."""
    first = [f"tcp://127.0.0.1:{port}" for port in range(1, ROUTERS_MAX)] + ["no address"]
    late = ["tcp://127.0.0.1:1000"]
    assert tick(announcer, first, 0.0) == set(first) - {"no address"}
    for now in (1.5, 3.0):
        assert tick(announcer, [*first, *late], now) == set(first) - {"no address"}
    assert counters["routers_refused"] == 2
    assert caplog.text.count("is told nothing") == 1
    assert tick(announcer, late, 4.5) == set(first) - {"no address"}, "an engine may be about to come back"
    assert tick(announcer, late, 3.0 + UNNAMED_S + 1) == set(late)


def test_a_router_that_says_much_leaves_the_others_their_turn(
    announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdx.daemon.announcer.BURST", 3)
    heard: list[CancelHandoff] = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        lock(router, KEY, server=True)
        router.bind("tcp://127.0.0.1:0")
        endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        tick(announcer, [endpoint], 0.0)
        assert router.poll(WAIT_MS)
        name, _ = router.recv_multipart()
        for number in range(5):
            cancel = CancelHandoff(handoff_id=bytes([number]) * 16, attempt=1, reason="over")
            router.send_multipart([name, encode(cancel)])
        socket = announcer._sockets[endpoint]
        end = time.monotonic() + WAIT_MS / 1000
        while len(heard) < 5 and time.monotonic() < end:
            assert socket.poll(WAIT_MS)
            before = len(heard)
            ready = {socket: zmq.POLLIN}
            announcer.handle_ready(ready, cancel=heard.append, share=pytest.fail, answer=pytest.fail)
            assert len(heard) - before <= 3
    assert [cancel.handoff_id[0] for cancel in heard] == list(range(5))


def test_a_router_of_another_version_is_named_once_with_both_versions(
    announcer: Announcer, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers, so neither its key nor its life is to be doubted."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        lock(router, KEY, server=True)
        router.bind("tcp://127.0.0.1:0")
        endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        for now in (0.0, 1.5, 3 * SILENT_ROUTER_S):
            tick(announcer, [endpoint], now)
            assert router.poll(WAIT_MS)
            name, _ = router.recv_multipart()
            router.send_multipart([name, MAGIC + bytes([WIRE_VERSION + 1]) + b"\x80"])
            socket = announcer._sockets[endpoint]
            assert socket.poll(WAIT_MS)
            announcer.handle_ready({socket: zmq.POLLIN}, cancel=pytest.fail, share=pytest.fail, answer=pytest.fail)
    assert caplog.text.count(f"wire version {WIRE_VERSION + 1}, this side {WIRE_VERSION}") == 1
    assert "does not answer" not in caplog.text
