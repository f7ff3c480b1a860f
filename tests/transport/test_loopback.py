"""What only the reference lane can do: step by step, the same every time, and cut on demand."""

from __future__ import annotations

import random

import pytest

from pdx.errors import ConfigError
from pdx.transport.api import Copy, PeerLost, PutDone, PutFailed, Span, WindowClosed
from pdx.transport.loopback import LoopbackNet
from pdx.transport.side import MEMORY_BYTES, Side, arrivals_of, losses_of


def test_window_closed_between_frames() -> None:
    net = LoopbackNet(random.Random(0))
    near, far = Side(net.open_lane("near"), seed=1), Side(net.open_lane("far"), seed=2)
    channel = near.lane.connect(far.lane.endpoint)
    window = far.region.open_window([Span(0, MEMORY_BYTES)])
    ticket = near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)], notice=b"whole")
    assert net.step()
    assert net.step()
    far.region.close_window(window)
    landed = bytes(far.memory)
    assert landed != bytes(near.memory)
    net.pump()
    far.events += far.lane.take_events()
    assert far.events == [WindowClosed(window)]
    assert far.memory == landed
    assert near.wait_end(ticket) == PutDone(ticket)
    near.lane.abort()
    far.lane.abort()


def test_cut_and_mend() -> None:
    net = LoopbackNet(random.Random(0))
    near, far = Side(net.open_lane("near"), seed=1), Side(net.open_lane("far"), seed=2)
    channel = near.lane.connect(far.lane.endpoint)
    window = far.region.open_window([Span(0, 10)])
    tickets = [near.put(channel, window, [Copy(0, 0, 10)]) for _ in range(2)]
    net.cut(far.lane.endpoint)
    near.wait_lost(channel)
    assert [type(event) for event in near.events] == [PutFailed, PutFailed, PeerLost]
    assert [event.ticket for event in near.events[:2] if isinstance(event, PutFailed)] == tickets
    while_cut = near.lane.connect(far.lane.endpoint)
    near.wait_lost(while_cut)
    net.mend(far.lane.endpoint)
    near.put(near.lane.connect(far.lane.endpoint), window, [Copy(0, 0, 10)], notice=b"again")
    far.wait_arrived(b"again")
    near.lane.abort()
    far.lane.abort()


def run_of(seed: int) -> list[bytes]:
    net = LoopbackNet(random.Random(seed))
    sides = [Side(net.open_lane(name), seed=seed) for name in ("a", "b", "c")]
    rng = random.Random(seed)
    window = sides[2].region.open_window([Span(0, MEMORY_BYTES)])
    for index in range(40):
        side = rng.choice(sides[:2])
        channel = side.lane.connect(sides[2].lane.endpoint)
        copies = [Copy(0, 0, rng.randrange(MEMORY_BYTES))]
        side.put(channel, window, copies, notice=b"%d" % index, queue=b"%d" % rng.randrange(3), urgency=rng.random())
    net.pump()
    events = sides[2].lane.take_events()
    for side in sides:
        assert losses_of(side.events, 1) == []
        side.lane.abort()
    return arrivals_of(events)


def test_deterministic() -> None:
    assert run_of(1) == run_of(1)
    assert sorted(run_of(1)) == sorted(run_of(2))


def test_name_is_taken_while_alive() -> None:
    net = LoopbackNet(random.Random(0))
    lane = net.open_lane("a")
    with pytest.raises(ConfigError):
        net.open_lane("a")
    lane.abort()
    net.open_lane("a").abort()
