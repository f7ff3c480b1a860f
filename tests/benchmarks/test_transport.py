"""The transport benchmark: shapes cover a memory, arms move it, and what is judged is what was measured."""

from __future__ import annotations

import itertools
import os
import sys
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from benchmarks.harness import netns
from benchmarks.harness.report import Report
from benchmarks.transport import __main__ as bench
from benchmarks.transport import libraries, sharing
from benchmarks.transport.pair import Move, Pair
from benchmarks.transport.shapes import SHAPES, Shape
from pdx.transport.api import Copy

TINY = Shape(64 << 10, 16)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_puts_cover_source_and_target_once(shape: Shape) -> None:
    for total_bytes in (bench.TOTAL_BYTES, bench.QUICK_BYTES):
        copies = [copy for put in shape.puts(total_bytes) for copy in put]
        for starts in ([copy.source_offset for copy in copies], [copy.target_offset for copy in copies]):
            assert sorted(starts) == list(range(0, total_bytes, shape.span_bytes))
        assert all(len(put) == shape.batch for put in shape.puts(total_bytes))


@pytest.mark.parametrize("arm", ["bare sockets", "pdx tcp"])
def test_an_arm_moves_every_byte_and_back(arm: str) -> None:
    memories = bench.Memories(4 << 20)
    pair = Pair(arm, memories.files, {})
    try:
        memories.check(pair, TINY)
        move = pair.move(TINY)
        assert move.seconds > 0 and move.cpu_s > 0
        assert len(pair.round_trips(3)) == 3
        memories.source[5] ^= 1  # what is not sent again must be noticed
        pair.move = lambda shape: move  # type: ignore[method-assign]
        with pytest.raises(SystemExit, match="other bytes landed"):
            memories.check(pair, TINY)
    finally:
        pair.close()
        for descriptor in memories.files:
            os.close(descriptor)


class Timed:
    """An arm whose moves take so many seconds, turn by turn."""

    def __init__(self, arm: str, *seconds: float) -> None:
        self.arm, self._seconds = arm, itertools.cycle(seconds)

    def move(self, shape: Shape) -> Move:
        return Move(next(self._seconds), 1.0)

    def round_trips(self, rounds: int) -> list[float]:
        return [next(self._seconds)] * rounds


def bars_of(*arms: Timed, monkeypatch: pytest.MonkeyPatch, rounds: int = 1) -> dict[str, dict[str, Any]]:
    report, memories = Report("transport"), bench.Memories(1 << 20)
    monkeypatch.setattr(bench, "SHAPES", (TINY,))
    try:
        bench.latencies(report, cast(Any, arms), 5)
        bench.rates(report, memories, cast(Any, arms), rounds)
    finally:
        for descriptor in memories.files:
            os.close(descriptor)
    return report.bars


def test_bars_against_arms_that_were_not_run_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bars_of(Timed("pdx tcp", 1.0), monkeypatch=monkeypatch) == {}
    assert list(bars_of(Timed("pdx tcp", 1.0), Timed("bare sockets", 1.0), monkeypatch=monkeypatch)) == [
        "pdx tcp: one slab above a bare one, p50",
        "pdx tcp of bare sockets, 16 x 64 KiB",
    ]


def test_the_better_of_two_peers_is_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn by turn: here each of them is ahead once, and both times as fast as our lane."""
    arms = Timed("pdx tcp", 1.0), Timed("NIXL over tcp", 1.0, 9.0), Timed("NIXL over tcp, spinning", 9.0, 1.0)
    monkeypatch.setattr(bench, "latencies", lambda *_: None)
    bars = bars_of(*arms, monkeypatch=monkeypatch, rounds=2)
    assert bars["pdx tcp of the better NIXL over tcp, 16 x 64 KiB"]["value"] == 1.0
    assert len(bars) == 1


@pytest.mark.parametrize(("has_thread", "sleeps"), [(True, 3), (False, 0)])
def test_nixl_s_thread_gets_the_core_while_its_user_waits(
    has_thread: bool, sleeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its progress thread is pinned beside our loop: polling without rest would measure that loop."""
    agent = Mock()
    agent.get_new_notifs.side_effect = [{}, {}, {"them": [b"landed"]}]
    agent.check_xfer_state.side_effect = ["PROC", "DONE"]
    api = Mock(nixl_agent=lambda *_: agent, nixl_agent_config=Mock())
    monkeypatch.setitem(sys.modules, "nixl", Mock(_api=api))
    monkeypatch.setitem(sys.modules, "nixl._api", api)
    slept: list[float] = []
    monkeypatch.setattr("benchmarks.transport.libraries.time.sleep", slept.append)
    end = libraries.NixlEnd("source", memoryview(bytearray(64)), has_thread=has_thread)
    end.receive([[Copy(0, 0, 1)]])
    flying = ["a transfer"]
    end._collect(flying)
    end._collect(flying)
    assert not flying
    assert slept == [libraries.LOOK_EVERY_S] * sleeps


def test_jain_s_index() -> None:
    assert sharing.jain([5, 5, 5, 5]) == 1.0
    assert sharing.jain([8, 0, 0, 0]) == 0.25


def beats_of(monkeypatch: pytest.MonkeyPatch) -> sharing.Beats:
    """On loopback."""
    monkeypatch.setattr(sharing, "inside", lambda host, make: make())
    host = SimpleNamespace(wire="127.0.0.1")
    return sharing.Beats(cast(Any, SimpleNamespace(source=host, target=host)))


def verdicts(beats: sharing.Beats) -> dict[str, bool]:
    report = Report("transport")
    beats.judge(report, "wire")
    return {name.partition(": ")[2]: bar["holds"] for name, bar in report.bars.items()}


def test_beats_that_come_to_their_end_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "BEAT_EVERY_S", 0.001)
    monkeypatch.setattr(sharing, "BEATS_SHARE", 0.0)  # how many come is for a machine that does nothing else
    monkeypatch.setattr(sharing, "LATE_S", 60.0)
    beats = beats_of(monkeypatch)
    with beats:
        while not beats.count:
            assert beats._threads[1].is_alive(), "the receiver has given up"
    assert beats.lasted_s > 0
    assert all(verdicts(beats).values())
    beats.lasted_s, beats.count = 100.0, 10
    monkeypatch.setattr(sharing, "BEATS_SHARE", 0.8)
    assert verdicts(beats) == {"longest beat of 10": True, "beats that came": False}


def test_beats_that_stop_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, and the receiver gives up."""
    monkeypatch.setattr(sharing, "LOST_S", 0.05)
    monkeypatch.setattr(sharing, "BEAT_EVERY_S", 60.0)
    monkeypatch.setattr(sharing, "LATE_S", 0.01)
    beats = beats_of(monkeypatch)
    with beats:
        beats._threads[1].join(20)
    assert verdicts(beats) == {"longest beat of 0": False, "beats that came": False}


@pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not() or "there are namespaces")
def test_four_handoffs_share_a_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it runs and fills in its figures; whether bars hold is for a machine that does nothing else."""
    for name, value in (
        ("MBITS", (1000,)), ("QUICK_SHARE_S", 0.3), ("QUICK_IDLE_SLABS", 3), ("QUICK_BURSTS", 1),
        ("BURST_BYTES", 8 << 20),
    ):  # fmt: skip
        monkeypatch.setattr(sharing, name, value)
    monkeypatch.setattr(sharing, "rate", lambda **_: None)
    report = Report("transport")
    sharing.measure(report, quick=True)
    assert len(report.bars) == 5
    assert report.figures["1000 Mbit/s"]["handoffs_mb_s"] > 1
