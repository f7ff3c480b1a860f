"""Which events of lanes wake the control thread up, and which come along with others."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from pdx.daemon.lanewatch import HALVES_ASKED, LANES_S, LaneWatch
from pdx.transport.api import WindowClosed
from pdx.transport.loopback import LoopbackNet


def handoffs(*hurried: bool, waiting: int = 0) -> Any:
    """Sending halves under way, in a hurry or not."""
    records = [SimpleNamespace(sender=SimpleNamespace(hurried=each)) for each in hurried]
    return SimpleNamespace(halves=(records, []), reservations_waiting=waiting)


@pytest.mark.parametrize(
    ("under_way", "wakes"),
    [
        (handoffs(), True),
        (handoffs(False), False),
        (handoffs(False, True), True),
        (handoffs(False, waiting=1), True),
        (handoffs(*[False] * HALVES_ASKED), False),
        (handoffs(*[False] * (HALVES_ASKED + 1)), True),
    ],
)
def test_what_a_lane_says_wakes_where_somebody_waits_for_it(under_way: Any, wakes: bool) -> None:
    lane, poller = LoopbackNet(random.Random(1)).open_lane("here"), zmq.Poller()
    watch, region = LaneWatch([lane], poller), lane.register(memoryview(bytearray(64)))
    for _ in range(2):  # and again, once it has looked otherwise
        window = region.open_window([])
        region.close_window(window)
        allowed_s = watch.begin(under_way, 1.0)
        assert allowed_s == (1.0 if wakes else LANES_S)
        ready = dict(poller.poll(0))
        assert (lane.fileno() in ready) is wakes
        assert list(watch.take(ready)) == [(lane.scheme, [WindowClosed(window)])], "taken in any turn"
        watch.begin(handoffs(not wakes), 1.0)
    lane.abort()
