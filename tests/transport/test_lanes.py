"""Every lane of this package against the one suite that defines a lane."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from pdx.transport.api import Lane
from pdx.transport.conformance import CHECKS, Check
from pdx.transport.faulty import Faults, Faulty
from pdx.transport.loopback import LoopbackNet
from pdx.transport.tcp import TcpLane

KEY = b"0123456789abcdef"


class OpenPair:
    """A Pair around a function that opens one lane; a port or name given to it is an endpoint to come back to."""

    def __init__(self, open_lane: Callable[[str], Lane], *, near: str, far: str) -> None:
        self._open_lane = open_lane
        self.near = open_lane(near)
        self.far = open_lane(far)
        self._opened = [self.near, self.far]

    def kill_far(self) -> None:
        self.far.abort()

    def revive_far(self) -> Lane:
        self.far = self._open_lane(self.far.endpoint)
        self._opened.append(self.far)
        return self.far

    def abort(self) -> None:
        for lane in self._opened:
            lane.abort()


@contextmanager
def tcp_pair() -> Iterator[OpenPair]:
    pair = OpenPair(lambda url: TcpLane(url, key=KEY, name="test"), near="tcp://127.0.0.1:0", far="tcp://127.0.0.1:0")
    try:
        yield pair
    finally:
        pair.abort()


@contextmanager
def loopback_pair() -> Iterator[OpenPair]:
    net = LoopbackNet(random.Random(0))
    pair = OpenPair(lambda url: net.open_lane(url.removeprefix("loopback://")), near="near", far="far")
    try:
        yield pair
    finally:
        pair.abort()


@contextmanager
def faultless_pair() -> Iterator[OpenPair]:
    """Faulty with nothing but delays must still be a lane."""

    def open_lane(url: str) -> Lane:
        return Faulty(TcpLane(url, key=None, name="test"), random.Random(1), Faults(delay_chance=0.3))

    pair = OpenPair(open_lane, near="tcp://127.0.0.1:0", far="tcp://127.0.0.1:0")
    try:
        yield pair
    finally:
        pair.abort()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("make_pair", [tcp_pair, loopback_pair, faultless_pair], ids=["tcp", "loopback", "faulty"])
def test_lane(make_pair: Callable[[], AbstractContextManager[OpenPair]], check: Check) -> None:
    check(make_pair)
