"""Every lane of this package against the one suite that defines a lane, both sides in one process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
from lane_pairs import KEY, OpenPair, needing, open_any

from pdx.transport.api import Lane
from pdx.transport.conformance import CHECKS, Check
from pdx.transport.faulty import Faults, Faulty
from pdx.transport.loopback import LoopbackNet
from pdx.transport.tcp import TcpLane


@contextmanager
def pair_of(scheme: str) -> Iterator[OpenPair]:
    url = f"{scheme}://127.0.0.1:0"
    pair = OpenPair(partial(open_any, key=KEY, name="test"), near=url, far=url)
    try:
        yield pair
    finally:
        pair.abort()


@contextmanager
def tcp_pair_of_streams() -> Iterator[OpenPair]:
    """Several connections a peer, whatever this machine would have."""
    url = "tcp://127.0.0.1:0"
    pair = OpenPair(lambda url: TcpLane(url, key=KEY, name="test", streams=3), near=url, far=url)
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


PAIRS = [
    pytest.param(partial(pair_of, "tcp"), id="tcp"),
    pytest.param(tcp_pair_of_streams, id="tcp3"),
    pytest.param(loopback_pair, id="loopback"),
    pytest.param(faultless_pair, id="faulty"),
    pytest.param(partial(pair_of, "nixl"), id="nixl", marks=needing("nixl")),
    pytest.param(partial(pair_of, "ucx"), id="ucx", marks=needing("ucx")),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("make_pair", PAIRS)
def test_lane(make_pair: Callable[[], AbstractContextManager[OpenPair]], check: Check) -> None:
    check(make_pair)
