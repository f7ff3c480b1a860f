"""Faults strike as scheduled, and the contract holds all the same."""

from __future__ import annotations

import random

from pdx.transport.api import Copy, Event, PutDone, PutFailed, Span
from pdx.transport.faulty import Faults, Faulty
from pdx.transport.loopback import LoopbackNet
from pdx.transport.side import MEMORY_BYTES, Side, arrivals_of, ends_of, losses_of
from pdx.transport.tcp import TcpLane


def loopback_sides(seed: int, faults: Faults) -> tuple[Faulty, Side, Side]:
    net = LoopbackNet(random.Random(seed))
    faulty = Faulty(net.open_lane("near"), random.Random(seed), faults)
    return faulty, Side(faulty, seed=1), Side(net.open_lane("far"), seed=2)


def test_corrupts_exactly_one_bit() -> None:
    faulty, near, far = loopback_sides(3, Faults(corrupt_chance=1.0))
    window = far.region.open_window([Span(0, MEMORY_BYTES)])
    source = bytes(near.memory)
    copies = [Copy(0, 1 << 20, 1 << 20), Copy(1 << 20, 0, 1 << 20)]
    near.put(near.lane.connect(far.lane.endpoint), window, copies, notice=b"bad")
    far.wait_arrived(b"bad")
    sent = source[1 << 20 : 2 << 20] + source[: 1 << 20]
    wrong = [a ^ b for a, b in zip(sent, far.memory, strict=False) if a != b]
    assert len(wrong) == 1
    assert wrong[0].bit_count() == 1
    assert near.memory == source
    assert faulty.corrupt_count == 1
    faulty.abort()
    far.lane.abort()


def test_breaks_after_bytes() -> None:
    faulty, near, far = loopback_sides(3, Faults(break_after_bytes=2500))
    window = far.region.open_window([Span(0, MEMORY_BYTES)])
    channel = near.lane.connect(far.lane.endpoint)
    tickets = []
    for _ in range(3):
        tickets.append(near.put(channel, window, [Copy(0, 0, 1000)]))
        near.take()
    near.wait_lost(channel)
    assert [type(near.wait_end(ticket)) for ticket in tickets] == [PutDone, PutDone, PutFailed]
    assert faulty.break_count == 1
    faulty.abort()
    far.lane.abort()


def chaos(seed: int) -> list[Event]:
    faults = Faults(break_chance=0.05, corrupt_chance=0.1, delay_chance=0.4, break_after_puts=30)
    faulty, near, far = loopback_sides(seed, faults)
    window = far.region.open_window([Span(0, MEMORY_BYTES)])
    tickets = []
    for index in range(100):
        channel = near.lane.connect(far.lane.endpoint)
        tickets.append(near.put(channel, window, [Copy(0, 0, 1000)], notice=b"%d" % index))
        near.take()
    for ticket in tickets:
        near.wait_end(ticket)
    faulty.abort()
    far.lane.abort()
    return near.events


def test_same_seed_same_story() -> None:
    assert chaos(1) == chaos(1)
    assert chaos(1) != chaos(2)


def test_tcp_under_breaks_ends_every_ticket_once() -> None:
    faulty = Faulty(TcpLane("tcp://127.0.0.1:0", key=None, name="near"), random.Random(9), Faults(break_chance=0.2))
    near, far = Side(faulty, seed=1), Side(TcpLane("tcp://127.0.0.1:0", key=None, name="far"), seed=2)
    try:
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        tickets = {}
        for index in range(60):
            channel = near.lane.connect(far.lane.endpoint)
            ticket = near.put(channel, window, [Copy(0, 0, 300_000)], notice=b"%d" % index)
            tickets[ticket] = b"%d" % index
        done = {tickets[ticket] for ticket in tickets if isinstance(near.wait_end(ticket), PutDone)}
        assert all(len(ends_of(near.events, ticket)) == 1 for ticket in tickets)
        assert set(arrivals_of(far.lane.take_events())) <= done
        assert losses_of(near.events, channel) or faulty.break_count > 0
    finally:
        near.lane.abort()
        far.lane.abort()
