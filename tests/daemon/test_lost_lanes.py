"""Which lane handoffs take as lanes fail and come back. Time is passed in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from one_host import PAGES, engine

from pdx.daemon.lanes import REST_FIRST_S, REST_MAX_S, Lanes
from pdx.daemon.sending import Outgoing, SendingHalves
from pdx.errors import UnknownTransport
from pdx.transport.loopback import LoopbackNet
from pdx.transport.tcp import TcpLane
from pdx.wire import DaemonRef, LaneOffer

BETTER, TCP = "loopback://there", "tcp://127.0.0.1:9"


def peer(name: str, *endpoints: str) -> DaemonRef:
    offers = [LaneOffer(endpoint=endpoint) for endpoint in endpoints]
    return DaemonRef(daemon_id=name, incarnation=1, control=f"tcp://{name}", lanes=offers)


ME, PEER = peer("me"), peer("peer", BETTER, TCP)


@pytest.fixture
def counters() -> Counter[str]:
    return Counter()


@pytest.fixture
def lanes(counters: Counter[str]) -> Iterator[Lanes]:
    """A daemon with two lanes, of which it was asked to take the first."""
    here = [LoopbackNet(random.Random(0)).open_lane("here"), TcpLane("tcp://127.0.0.1:0", key=None, name="test")]
    memory = memoryview(bytearray(64))
    yield Lanes(
        [(lane, lane.register(memory)) for lane in here], me="me", counters=counters, transport="loopback",
        absent=["nixl is not installed"],
    )  # fmt: skip
    for lane in here:
        lane.abort()


def schemes(lanes: Lanes, now: float, count: int = 3) -> list[str]:
    routes = [lanes.route(PEER, now) for _ in range(count)]
    for route in routes:
        lanes.taken(route)
    return [route.scheme for route in routes]


def test_within_the_daemon_no_lane_is_taken(lanes: Lanes, counters: Counter[str]) -> None:
    route = lanes.route(ME, 0.0)
    assert (route.scheme, route.lane, route.choice.reason) == ("local", None, "same daemon")
    lanes.taken(route)
    lanes.ended(route, proved=True)
    assert counters["handoffs_by_local"] == 1


def test_a_lost_lane_rests_and_then_one_handoff_tries_it(lanes: Lanes) -> None:
    assert schemes(lanes, 0.0) == ["loopback"] * 3
    lanes.lost("loopback", BETTER, "fabric error", 100.0)
    assert schemes(lanes, 100.0 + REST_FIRST_S - 0.1) == ["tcp"] * 3
    trial = lanes.route(PEER, 100.0 + REST_FIRST_S)
    assert trial.scheme == "loopback"
    assert schemes(lanes, 150.0) == ["tcp"] * 3
    lanes.ended(trial, proved=True)
    assert schemes(lanes, 150.0) == ["loopback"] * 3
    assert lanes.describe(150.0)["peers"]["peer"]["resting"] == {}


def test_a_trial_that_proves_nothing_is_repeated(lanes: Lanes) -> None:
    lanes.route(PEER, 0.0)
    lanes.lost("loopback", BETTER, "fabric error", 0.0)
    lanes.ended(lanes.route(PEER, 50.0), proved=False)  # its engine died
    assert lanes.route(PEER, 50.0).scheme == "loopback"


def test_pauses_double_up_to_a_cap(lanes: Lanes) -> None:
    lanes.route(PEER, 0.0)
    now, pauses = 0.0, []
    for _ in range(12):
        lanes.lost("loopback", BETTER, "fabric error", now)
        assert schemes(lanes, now) == ["tcp"] * 3
        pauses.append(lanes.describe(now)["peers"]["peer"]["resting"][BETTER]["for_s"])
        now += pauses[-1]
        assert lanes.route(PEER, now).scheme == "loopback"
    assert pauses[:3] == [REST_FIRST_S, 2 * REST_FIRST_S, 4 * REST_FIRST_S]
    assert pauses[-1] == REST_MAX_S


def test_a_handoff_from_before_the_loss_proves_nothing(lanes: Lanes) -> None:
    early = lanes.route(PEER, 0.0)
    lanes.lost("loopback", BETTER, "fabric error", 1.0)
    lanes.ended(early, proved=True)  # its pages had all landed
    assert schemes(lanes, 2.0) == ["tcp"] * 3


def test_a_loss_is_charged_to_the_living_one_too_if_a_late_handle_names_its_former_life(lanes: Lanes) -> None:
    """At fixed ports a daemon that has started anew offers what it offered before."""
    former = peer("former", BETTER, TCP)
    lanes.route(former, 0.0)
    lanes.route(PEER, 0.0)
    lanes.lost("loopback", BETTER, "fabric error", 1.0)
    assert schemes(lanes, 2.0) == ["tcp"] * 3


def test_who_waits_for_room_is_given_another_lane_for_one_that_was_lost(lanes: Lanes, counters: Counter[str]) -> None:
    desk = SimpleNamespace(store=SimpleNamespace(claim=lambda *_, **__: None), ports=SimpleNamespace(lease_s=1.0))
    halves = SendingHalves(desk, None, lanes, None)  # type: ignore[arg-type]
    sender = SimpleNamespace(handle=SimpleNamespace(decode_daemon=PEER))
    asks = SimpleNamespace(tenant=b"", block_hashes=[], tail_hash=b"")
    waits = Outgoing((b"h", 0), sender, PAGES, engine("P"), asks)  # type: ignore[arg-type]
    taken = []
    for now, is_lost in ((0.0, False), (0.1, True), (0.2, False), (99.0, False)):
        if is_lost:
            lanes.lost("loopback", BETTER, "fabric error", now)
        assert not halves.claim(waits, now)
        assert waits.route is not None
        taken.append((waits.route, waits.route.scheme))
    assert [scheme for _, scheme in taken] == ["loopback", "tcp", "tcp", "tcp"]
    assert len({id(route) for route, _ in taken}) == 2, "a lane that was not lost is kept"
    assert not counters["handoffs_by_loopback"] and not counters["handoffs_by_tcp"], "it has taken none yet"


def test_who_tries_a_lane_while_it_waits_for_room_gives_the_trial_up_if_it_is_lost_again(lanes: Lanes) -> None:
    lanes.route(PEER, 0.0)
    lanes.lost("loopback", BETTER, "fabric error", 0.0)
    trial = lanes.route(PEER, 10.0)
    assert lanes.route(PEER, 11.0, before=trial) is trial
    assert schemes(lanes, 11.0) == ["tcp"] * 3
    lanes.lost("loopback", BETTER, "fabric error", 12.0)
    assert lanes.route(PEER, 12.0, before=trial).scheme == "tcp"
    again = lanes.route(PEER, 60.0)
    assert again.scheme == "loopback"
    lanes.ended(trial, proved=True)
    assert schemes(lanes, 60.0) == ["tcp"] * 3, "it is the other one's trial now"


def test_the_only_lane_of_a_pair_is_taken_while_it_rests(lanes: Lanes) -> None:
    only = peer("only", TCP)
    lanes.route(only, 0.0)
    lanes.lost("tcp", TCP, "reset", 0.0)
    assert lanes.route(only, 0.0).scheme == "tcp"


def test_no_common_lane(lanes: Lanes) -> None:
    with pytest.raises(UnknownTransport, match="the peer has no loopback, the peer has no tcp"):
        lanes.route(peer("strange", "pigeon://roof"), 0.0)


def test_what_is_told_of_it(lanes: Lanes, counters: Counter[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    schemes(lanes, 0.0)
    lanes.lost("loopback", BETTER, "fabric error", 1.0)
    schemes(lanes, 2.0, count=2)
    told = lanes.describe(2.0)["peers"]["peer"]
    assert (told["lane"], told["reason"]) == (TCP, "nixl is not installed, loopback failed between the two")
    assert told["resting"] == {BETTER: {"losses": 1, "for_s": REST_FIRST_S - 1.0}}
    assert counters == {"handoffs_by_loopback": 3, "lanes_lost_loopback": 1, "handoffs_by_tcp": 2}
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "lane to daemon peer", "lane loopback to daemon peer is lost", "lane to daemon peer",
    ]  # fmt: skip
    lanes.forget(PEER.control)
    assert lanes.describe(2.0)["peers"] == {}
