"""Finding a lane by its URL."""

from __future__ import annotations

import pytest

from pdx.errors import ConfigError, UnknownTransport
from pdx.transport.registry import choose, known_schemes, open_best, open_lane


def test_tcp_binds_a_free_port_and_publishes_it() -> None:
    lane = open_lane("tcp://127.0.0.1:0", key=None, name="test")
    try:
        assert lane.scheme == "tcp"
        assert lane.endpoint.startswith("tcp://127.0.0.1:")
        assert not lane.endpoint.endswith(":0")
    finally:
        lane.close(drain_s=0.0)


def test_unknown_scheme_lists_the_known() -> None:
    with pytest.raises(UnknownTransport, match=r"known: nixl, tcp, ucx.*LoopbackNet"):
        open_lane("carrier-pigeon://roof", key=None, name="test")
    assert "tcp" in known_schemes()


@pytest.mark.parametrize(
    "url", ["tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:1/x", "tcp://[::1"]
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(ConfigError):
        open_lane(url, key=None, name="test")


def test_off_loopback_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="cluster key"):
        open_lane("tcp://192.0.2.1:0", key=None, name="test")


def test_a_taken_port_is_a_configuration_error() -> None:
    lane = open_lane("tcp://127.0.0.1:0", key=None, name="test")
    try:
        with pytest.raises(ConfigError):
            open_lane(lane.endpoint, key=None, name="test")
    finally:
        lane.abort()


def test_the_best_common_lane_and_why_not_a_better_one() -> None:
    theirs = ["tcp://10.0.0.2:1", "ucx://10.0.0.2:2"]
    assert choose(["ucx", "tcp"], theirs).endpoint == "ucx://10.0.0.2:2"
    choice = choose(["nixl", "ucx", "tcp"], theirs, avoid={"ucx://10.0.0.2:2"})
    assert (choice.endpoint, choice.scheme) == ("tcp://10.0.0.2:1", "tcp")
    assert choice.reason == "the peer has no nixl, ucx failed between the two"
    with pytest.raises(UnknownTransport, match="the peer has no nixl; the peer offers"):
        choose(["nixl"], theirs)


def test_a_lane_that_cannot_be_had_costs_a_reason_and_the_last_an_error() -> None:
    lanes, reasons = open_best("127.0.0.1", schemes=["carrier-pigeon", "tcp"], key=None, name="test")
    try:
        assert [lane.scheme for lane in lanes] == ["tcp"]
        assert len(reasons) == 1 and reasons[0].startswith("carrier-pigeon: no lane for scheme")
    finally:
        for lane in lanes:
            lane.abort()
    with pytest.raises(UnknownTransport):
        open_best("127.0.0.1", schemes=["carrier-pigeon"], key=None, name="test")
