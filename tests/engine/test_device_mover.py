"""Pages in device memory: right in every order in which a device may do its work; and the naive is found out."""

from __future__ import annotations

import time

import pytest
from moving_engine import HOOKS, LAYOUT, MovingEngine, Receiving, WatchfulDaemon
from stream_model import ModelDevice, ModelEvent, ModelStream, UnorderedAccess

from pdx.engine import device_loads, device_mover
from pdx.engine.device_loads import DeviceLoads
from pdx.engine.fence import Fence
from pdx.engine.header_words import HeaderWords
from pdx.engine.staging_ring import Buffer, StagingRing
from pdx.errors import DeviceLost, Refused
from pdx.wire import Filled, LetGo

SEEDS = range(6)
PACES = ("eager", "random", "lazy", "copies starve", "loads starve", "compute far ahead")


def paced(engine: MovingEngine, pace: str) -> None:
    """How the device does its work. Streams in order of making: compute, gather, copy out, copy in, scatter."""
    engine.device.eager = pace == "eager"
    engine.device.starved = {"lazy": {0, 1, 2, 3, 4}, "copies starve": {2}, "loads starve": {3, 4}}.get(pace, set())
    if pace == "compute far ahead":
        engine.device.starved = {1, 2, 3, 4}


def life(engine: MovingEngine, pace: str, *, steps: int = 12, faults: float = 0.0) -> None:
    """Some requests of each kind, in every mode, while the device and the other thread get on as they like."""
    paced(engine, pace)
    chance = engine.random
    for _ in range(steps):
        starting = []
        if len(engine.free) > 12 and chance.random() < 0.5:
            engine.send([chance.choice((1, 2, 4)) for _ in range(chance.randint(1, 2))])
        if len(engine.free) > 14 and chance.random() < 0.4:
            starting.append(f"load {engine.number}")
            engine.receive(starting[0], [chance.choice((1, 2, 4))])
        engine.step(hooks=chance.choice(HOOKS), starting=starting)
        for receiving in engine.receiving.values():
            for block in range(len(receiving.places)):
                if chance.random() < 0.7:
                    engine.land(receiving, block)
                if chance.random() < faults:
                    engine.spoil(receiving, block, chance.choice(("bytes", "slot")))
        if chance.random() < faults and engine.receiving:
            engine.dropping.append(chance.choice(list(engine.receiving)))
        engine.device.advance(chance.randint(0, 25))
        engine.complete(chance.randint(0, 4))
        engine.daemon.check_watermarks()
        engine.check_fence()


def settle(engine: MovingEngine) -> None:
    for receiving in engine.receiving.values():
        for block in range(len(receiving.places)):
            for _ in range(LAYOUT.layers):
                engine.land(receiving, block)
    engine.finishing = list(engine.receiving)
    engine.drain()


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize(("staging_pages", "loads_straight"), [(1, False), (4, False), (4, True)])
def test_every_order_moves_the_same_pages(pace: str, staging_pages: int, loads_straight: bool) -> None:
    for seed in SEEDS:
        daemon = WatchfulDaemon(LAYOUT, blocks=512)
        engine = MovingEngine(seed, daemon, staging_pages=staging_pages, loads_straight=loads_straight)
        life(engine, pace)
        settle(engine)
        for handoff in daemon.handoffs.values():
            layers = set(range(LAYOUT.layers))
            assert handoff.filled == {block: layers for block in range(len(handoff.places))}
            assert [m.ok for m in handoff.let_go.values()] == [True]
        assert all(receiving.result is not None and receiving.result.ok for receiving in engine.over)
        assert daemon.arena.fence(0) == engine.number
        engine.close()
        assert engine.device.pinned == []


@pytest.mark.parametrize("pace", PACES)
def test_no_wrong_page_passes(pace: str) -> None:
    """Wrong bytes, slots that change hands in mid-load, loads dropped with copies under way."""
    ended: list[Receiving] = []
    for seed in SEEDS:
        engine = MovingEngine(seed, WatchfulDaemon(LAYOUT, blocks=512), staging_pages=2)
        life(engine, pace, faults=0.15)
        settle(engine)
        ended += engine.over
        engine.close()
    reasons = {receiving.result.reason for receiving in ended if receiving.result is not None}
    assert {"", "dropped"} <= reasons
    assert {"checksum", "generation"} <= {reason.split(" ")[-1] for reason in reasons}


@pytest.mark.parametrize("pace", PACES)
def test_a_daemon_that_dies_keeps_its_arena_for_the_copies_under_way(pace: str) -> None:
    for seed in SEEDS:
        first, second = (WatchfulDaemon(LAYOUT, blocks=512, incarnation=n) for n in (1, 2))
        engine = MovingEngine(seed, first)
        life(engine, pace, steps=6)
        told = len(first.received)
        engine.move_to(second)
        voice = first.clients[0].voices[0]
        for _ in range(3):
            life(engine, pace, steps=2)
            assert voice.open or not engine.device.pending_on(first.arena.memory)
        settle(engine)
        assert not voice.open
        assert len(first.received) == told
        gone = [r for r in engine.over if r.result is not None and r.result.reason == "pdxd is gone"]
        assert all(not receiving.result.ok for receiving in gone if receiving.result is not None)
        assert [pinned.memory.obj for pinned in engine.device.pinned] == [second.arena.memory.obj]
        let_gos = [m for handoff in second.handoffs.values() for m in handoff.let_go.values()]
        assert len(let_gos) == len(second.handoffs)
        assert {m.reason for m in let_gos} <= {"", "not all of its pages could be saved"}, "before it was pinned"
        engine.close()
        assert engine.device.pinned == []


@pytest.mark.parametrize("pace", PACES)
def test_of_a_lost_device_nothing_more_is_believed_and_its_engine_ends(pace: str) -> None:
    for seed in SEEDS:
        daemon = WatchfulDaemon(LAYOUT, blocks=512)
        engine = MovingEngine(seed, daemon)
        life(engine, pace, steps=6)
        engine.device.lose()
        told, fence = len(daemon.received), daemon.arena.fence(0)
        with pytest.raises(DeviceLost, match="started anew"):
            for _ in range(8):  # it is noticed with the first copy, or wait for one
                engine.step()
                engine.complete(engine.work_left)
        engine.complete(engine.work_left)
        assert len(daemon.received) == told
        assert daemon.arena.fence(0) == fence
        engine.close()


# --- what is naive -----------------------------------------------------------------------------------------------


class NoWaitOnCompute(ModelDevice):
    """The step ends without putting the engine's stream behind its gathers."""

    def wait(self, stream: ModelStream, event: ModelEvent) -> None:
        if stream is not self.compute_stream():
            super().wait(stream, event)


class DoneWhenGathered(ModelDevice):
    """A lot counts as done when it is in staging. (The second stream that the mover makes copies out.)"""

    def record(self, stream: ModelStream) -> ModelEvent:
        return super().record(self._streams[1] if stream.number == 2 else stream)


class ReadsWithoutWaiting(ModelDevice):
    """Gathers start without waiting for the engine's stream."""

    def wait(self, stream: ModelStream, event: ModelEvent) -> None:
        if event.stream is not self.compute_stream():
            super().wait(stream, event)


def lives(device: type[ModelDevice], *, checks_order: bool) -> None:
    for pace in PACES:
        for seed in SEEDS:
            daemon = WatchfulDaemon(LAYOUT, blocks=512)
            engine = MovingEngine(seed, daemon, device=device([], LAYOUT, seed=seed), staging_pages=2)
            engine.device.checks_order = checks_order
            life(engine, pace)
            settle(engine)


@pytest.mark.parametrize("device", [NoWaitOnCompute, ReadsWithoutWaiting, DoneWhenGathered])
def test_a_missing_wait_is_found_by_the_order(device: type[ModelDevice]) -> None:
    with pytest.raises(UnorderedAccess):
        lives(device, checks_order=True)


@pytest.mark.parametrize("device", [NoWaitOnCompute, ReadsWithoutWaiting, DoneWhenGathered])
def test_a_missing_wait_makes_wrong_bytes(device: type[ModelDevice]) -> None:
    with pytest.raises(AssertionError, match="told before it was there"):
        lives(device, checks_order=False)


@pytest.mark.parametrize(("checks_order", "error"), [(True, UnorderedAccess), (False, AssertionError)])
def test_staging_that_is_not_waited_for_is_overwritten(
    checks_order: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(ring: StagingRing, stream: object) -> Buffer:
        ring._next = (ring._next + 1) % len(ring._buffers)
        return ring._buffers[ring._next]

    monkeypatch.setattr(StagingRing, "take", take)
    with pytest.raises(error):
        lives(ModelDevice, checks_order=checks_order)


def test_blocks_that_change_hands_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceLoads, "blocks_change_hands", lambda loads: None)
    with pytest.raises(UnorderedAccess):
        lives(ModelDevice, checks_order=True)


def test_a_load_reported_with_copies_under_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceLoads, "settled", lambda loads, loading: True)
    engine = MovingEngine(1, WatchfulDaemon(LAYOUT, blocks=64))
    receiving = engine.receive("r", [4])
    engine.land(receiving, 0)
    engine.step(starting=["r"])
    engine.dropping = ["r"]
    with pytest.raises(AssertionError, match="reported with a copy under way"):
        engine.step()


def test_a_fence_that_does_not_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fence, "hold", lambda fence, step: None)
    engine = MovingEngine(1, WatchfulDaemon(LAYOUT, blocks=64))
    engine.send([4])
    for _ in range(3):
        engine.step()
    with pytest.raises(AssertionError, match="fence came too early"):
        engine.check_fence()


# --- one by one --------------------------------------------------------------------------------------------------


def saved_at_once(engine: MovingEngine, sizes: list[int]) -> None:
    engine.send(sizes)
    while engine.sending:
        engine.step(hooks="none", blocks_a_step=sum(sizes))


def test_pages_side_by_side_are_copied_together() -> None:
    engine = MovingEngine(3, WatchfulDaemon(LAYOUT, blocks=64), staging_pages=6)
    sending = engine.send([4, 4, 1])
    engine.random.randint = lambda low, high: high  # type: ignore[method-assign]
    engine.step(blocks_a_step=9)
    assert sending.next == 9
    assert engine.device.copies == [4, 2, 2, 1] * LAYOUT.layers
    engine.complete(99)
    assert [type(m) for m in engine.daemon.received] == [Filled] * LAYOUT.layers + [LetGo]
    engine.close()


def test_a_device_that_stands_still_costs_the_handoff_and_not_the_step() -> None:
    engine = MovingEngine(3, WatchfulDaemon(LAYOUT, blocks=64), staging_pages=1, lots_max=4, stall_s=0.05)
    began = time.monotonic()
    saved_at_once(engine, [4, 2])
    assert time.monotonic() - began < 3.0
    engine.complete(99)
    assert [(m.ok, m.reason) for m in engine.daemon.let_go] == [(False, "not all of its pages could be saved")]
    assert engine.daemon.arena.fence(0) == engine.number
    engine.close()


@pytest.mark.parametrize("lots_max", [1, 1000])
def test_the_thread_publishes_while_the_engine_is_idle_and_makes_room_while_it_is_not(lots_max: int) -> None:
    engine = MovingEngine(4, WatchfulDaemon(LAYOUT, blocks=64), staging_pages=1, threaded=True, lots_max=lots_max)
    for _ in range(3):
        saved_at_once(engine, [2, 1])
    engine.worker.close()
    assert [m.ok for m in engine.daemon.let_go] == [True] * 3
    assert engine.daemon.arena.fence(0) == engine.number
    assert engine.worker.take_counts()["pages_saved"] == 9 * LAYOUT.layers
    assert engine.device.pinned == []


def test_a_device_that_hangs_does_not_keep_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_mover, "CLOSE_S", 0.1)
    engine = MovingEngine(5, WatchfulDaemon(LAYOUT, blocks=64), threaded=True)
    voice = engine.daemon.clients[0].voices[0]
    engine.device.hangs.set()
    saved_at_once(engine, [1])
    began = time.monotonic()
    engine.worker.close()
    assert time.monotonic() - began < 3.0
    assert voice.open, "the daemon must not believe that nobody touches its slots"
    assert engine.device.pinned != []
    engine.device.wake()
    thread = engine.mover._completions._thread
    assert thread is not None
    thread.join(10.0)
    assert not voice.open
    assert engine.device.pinned == []


@pytest.mark.parametrize("pace", PACES)
def test_digests_of_saved_pages_and_of_loaded_ones(pace: str) -> None:
    for seed in range(5):
        daemon = WatchfulDaemon(LAYOUT, blocks=512, digest_mode=True)
        engine = MovingEngine(seed, daemon)
        life(engine, pace)
        settle(engine)
        assert all(m.ok for handoff in daemon.handoffs.values() for m in handoff.let_go.values())
        engine.close()


def test_in_digest_mode_what_was_copied_is_read_again() -> None:
    daemon = WatchfulDaemon(LAYOUT, blocks=64, digest_mode=True)
    engine = MovingEngine(7, daemon)
    sending = engine.send([1])
    while engine.sending:
        engine.step(hooks="none")
    engine.device.finish()
    daemon.arena.memory[sending.places[0].page_offset(LAYOUT, 1)] ^= 1
    engine.complete(99)
    assert [m.layer for m in daemon.received if isinstance(m, Filled)] == [0]
    assert [m.ok for m in daemon.let_go] == [False]
    assert engine.worker.take_counts()["checksum_mismatches"] == 1
    engine.close()


def test_an_arena_that_cannot_be_pinned_moves_nothing_and_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: ModelDevice, memory: memoryview) -> None:
        raise Refused("ulimit -l")

    monkeypatch.setattr(ModelDevice, "pin", refuse)
    engine = MovingEngine(8, WatchfulDaemon(LAYOUT, blocks=64))
    engine.send([1])
    engine.receive("r", [1])
    engine.step(starting=["r"])
    while engine.sending:
        engine.step()
    engine.complete(99)
    assert [receiving.result.reason for receiving in engine.over if receiving.result] == ["the arena can't be pinned"]
    assert [m.ok for m in engine.daemon.let_go] == [False]
    assert engine.daemon.arena.fence(0) == engine.number
    engine.close()


def test_a_step_begins_so_many_batches_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loads, "BATCHES_A_STEP", 2)
    engine = MovingEngine(9, WatchfulDaemon(LAYOUT, blocks=64), staging_pages=1)
    for name in ("r", "s"):
        receiving = engine.receive(name, [1])
        for _ in range(LAYOUT.layers):
            engine.land(receiving, 0)
    for begun in (2, 4, 6):
        engine.step(starting=["r", "s"] if begun == 2 else [])
        assert len(engine.device.copies) == begun
    engine.drain()
    assert [r.result.ok for r in engine.over if r.result] == [True, True]
    engine.close()


def test_loads_are_issued_ahead_of_their_verification_and_no_further_than_allowed() -> None:
    engine = MovingEngine(9, WatchfulDaemon(LAYOUT, blocks=64), staging_pages=2)
    engine.mover._loads._pages_max = 4
    engine.device.starved = {3, 4}
    receiving = engine.receive("r", [4])
    for block in range(4):
        for _ in range(LAYOUT.layers):
            engine.land(receiving, block)
    engine.step(starting=["r"])
    assert engine.device.copies == [2, 2], "two batches under way, ten pages wait"
    engine.step()
    assert engine.device.copies == [2, 2]
    engine.device.finish()
    engine.step()
    assert engine.device.copies == [2, 2, 2, 2]
    engine.drain()
    assert [r.result.pages for r in engine.over if r.result] == [4 * LAYOUT.layers]
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_takes_no_copy_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own bug, which no device reports: nothing more is told, no block is given back, and the engine ends."""

    def fail(words: HeaderWords, *_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(HeaderWords, "filled", fail)
    engine = MovingEngine(10, WatchfulDaemon(LAYOUT, blocks=64), threaded=True)
    engine.device.starved = {3, 4}
    receiving = engine.receive("r", [1])
    engine.land(receiving, 0)
    engine.step(starting=["r"])
    saved_at_once(engine, [1])
    thread = engine.mover._completions._thread
    assert thread is not None
    thread.join(10.0)
    with pytest.raises(DeviceLost):
        engine.step()
    assert engine.over == [], "its scatter is under way"
    engine.device.finish()
    assert engine.daemon.received == []
    engine.worker.close()
