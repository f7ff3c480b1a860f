"""Corners of the worker's half that a run of engines does not show: budgets, refusals, daemons that come and go."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from memory_daemon import Clock, MemoryAttachment, MemoryDaemon, steady
from torch_engine import LAYOUT

from pdx.engine.host_mover import BATCH_BYTES, HostMover
from pdx.engine.link import Link
from pdx.engine.vllm.caches import Layers
from pdx.engine.vllm.steps import Load, Save, Step
from pdx.engine.vllm.watch import Watch
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.errors import DeviceLost
from pdx.layout import PageLayout, Place
from pdx.wire import Filled, LetGo, OpenSend

HANDOFF = (1).to_bytes(16, "big")
# A batch is one of these pages.
LARGE = PageLayout(layers=5, page_bytes=BATCH_BYTES, chunk_blocks=1)


def worker_of(
    daemon: MemoryDaemon,
    layout: PageLayout,
    clock: Clock,
    *,
    blocks: int = 9,
    rank: int = 0,
    watch: Watch | None = None,
) -> WorkerSide:
    pages = tuple(np.full((blocks, layout.page_bytes), n + 1, dtype=np.uint8) for n in range(layout.layers))
    layers = Layers({f"layer.{n}": n for n in range(layout.layers)}, (0,) * layout.layers)
    mover = HostMover(pages, layout, shard=layout.shard_of_rank(rank))
    link = Link(MemoryAttachment(daemon))  # type: ignore[arg-type]
    return WorkerSide(link, layers, layout, mover, watch=watch or steady(), rank=rank, clock=clock)


def opened(daemon: MemoryDaemon, blocks: int) -> list[Place]:
    request = OpenSend(
        request_id="s", handle=daemon.handle(), block_hashes=[b"h"] * blocks, prompt_tokens=0, tail_hash=b""
    )
    daemon.client().send(request)
    return daemon.handoffs[HANDOFF].places


class TickingClock(Clock):
    """Every look at it takes a millisecond, so a batch does too."""

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def filled_worker(daemon: MemoryDaemon, clock: Clock) -> tuple[WorkerSide, list[Place]]:
    """A worker that has saved four blocks, in its first step."""
    places = opened(daemon, 4)
    worker = worker_of(daemon, daemon.layout, clock)
    saves = [Save(HANDOFF, [(n, (n + 1,), place) for n, place in enumerate(places)], last=True, pages=20)]
    worker.begin(Step(1, daemon.ref.incarnation, 16, saves=saves))
    worker.load()
    worker.end()
    return worker, places


@pytest.mark.parametrize(("forward_s", "steps"), [(None, 1), (0.0, 20), (0.052, 4), (100.0, 1)])
def test_a_load_takes_its_share_of_a_step_and_no_more(forward_s: float | None, steps: int) -> None:
    daemon, clock = MemoryDaemon(LARGE, blocks=4), TickingClock()
    worker, places = filled_worker(daemon, clock)
    taken = 0
    report = None
    for number in range(2, 2 + steps):
        assert report is None
        loads = [Load("r", places, [[5, 6, 7, 8]], 999.0, daemon.ref.incarnation)] if number == 2 else []
        worker.begin(Step(number, daemon.ref.incarnation, 16 * (forward_s is not None), loads=loads))
        clock.now += forward_s or 0.0
        worker.load()
        worker.end()
        now_taken = worker.take_counts().get("pages_verified", 0)
        assert now_taken >= 1
        taken += now_taken
        report = worker.take_ended()
    assert report is not None
    assert (report.loads["r"].ok, report.loads["r"].pages, taken) == (True, 20, 20)


def test_what_has_landed_is_taken_before_a_load_that_gets_no_more_ends() -> None:
    daemon, clock = MemoryDaemon(LARGE, blocks=4), Clock()
    worker, places = filled_worker(daemon, clock)
    daemon.arena.set_watermark(places[3].header_offset, 2)
    here = daemon.ref.incarnation
    loads = [Load("r", places, [[5, 6, 7, 8]], 9.0, here), Load("s", places, [[1, 2, 3, 4]], 9.0, here)]
    report, number = None, 2
    worker.begin(Step(2, daemon.ref.incarnation, 16, loads=loads))
    while report is None or "r" not in report.loads:
        worker.load()
        worker.end()
        report = worker.take_ended() or report
        number += 1
        assert number < 40
        worker.begin(Step(number, daemon.ref.incarnation, 16, finishing=["r"], dropping=["s"]))
    assert (report.loads["r"].ok, report.loads["r"].pages) == (False, 17)
    assert number > 10, "over many steps, at their pace"
    assert worker.take_invalid() == {1, 2, 3, 4, 8}, "the dropped load took nothing any more"


def test_layers_without_a_hook_are_swept_and_hooks_may_fire_twice(daemon: MemoryDaemon, clock: Clock) -> None:
    places = opened(daemon, 1)
    worker = worker_of(daemon, LAYOUT, clock)
    worker.begin(Step(1, daemon.ref.incarnation, 4, saves=[Save(HANDOFF, [(0, (2,), places[0])], last=True, pages=3)]))
    for name in ("layer.1", "layer.1", "unknown"):
        worker.save_layer(name)
    assert daemon.arena.watermark(places[0].header_offset) == 0
    worker.end()
    assert daemon.arena.watermark(places[0].header_offset) == 3
    assert [m.layer for m in daemon.received if isinstance(m, Filled)] == [1, 0, 2]
    assert isinstance(daemon.received[-1], LetGo)
    assert daemon.received[-1].fence == daemon.fence(daemon.clients[-1]) == 1


def test_what_a_step_could_not_save_is_not_called_whole(daemon: MemoryDaemon, clock: Clock) -> None:
    """A worker that has no arena in time saves nothing, and what comes later does not make up for it."""
    places = opened(daemon, 2)
    worker = worker_of(daemon, LAYOUT, clock)
    first = Save(HANDOFF, [(0, (2,), places[0])], last=False, pages=6)
    worker.begin(Step(1, daemon.ref.incarnation + 1, 4, saves=[first]))
    worker.end()
    worker.begin(Step(2, daemon.ref.incarnation, 4, saves=[Save(HANDOFF, [(1, (3,), places[1])], last=True, pages=6)]))
    worker.end()
    (last,) = (message for message in daemon.received if isinstance(message, LetGo))
    assert (last.ok, last.fence) == (False, 2)
    assert "could be saved" in last.reason


def test_a_rank_that_writes_nothing_lets_go_all_the_same(clock: Clock) -> None:
    """Latents are the same on all ranks: the first one saves them for all."""
    daemon = MemoryDaemon(LAYOUT, blocks=4)
    places = opened(daemon, 1)
    worker = worker_of(daemon, LAYOUT, clock, rank=1)
    worker.begin(Step(1, daemon.ref.incarnation, 4, saves=[Save(HANDOFF, [(0, (2,), places[0])], last=True, pages=3)]))
    worker.save_layer("layer.0")
    worker.end()
    assert daemon.arena.watermark(places[0].header_offset) == 0
    assert [type(message) for message in daemon.received[1:]] == [LetGo]


def test_an_engine_whose_copies_have_failed_ends(
    daemon: MemoryDaemon, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold what it is granted for ever: none of its fences passes any more."""
    worker = worker_of(daemon, LAYOUT, clock)
    monkeypatch.setattr(HostMover, "lost", property(lambda _: True))
    with pytest.raises(DeviceLost):
        worker.begin(Step(1, daemon.ref.incarnation, 0))


def test_a_load_for_another_incarnation_fails_untouched(daemon: MemoryDaemon, clock: Clock) -> None:
    places = opened(daemon, 2)
    worker = worker_of(daemon, LAYOUT, clock)
    here = daemon.ref.incarnation  # the step's own: a daemon that came after the places were granted
    worker.begin(Step(1, here, 0, loads=[Load("r", places, [[3, 4]], 9.0, here + 1)]))
    worker.load()
    worker.end()
    report = worker.take_ended()
    assert report is not None
    assert not report.loads["r"].ok
    assert worker.take_invalid() == {3, 4}
    assert worker.take_ended() is None
    assert worker.take_invalid() == set()


def test_a_load_waits_for_a_daemon_whose_arena_this_process_is_still_mapping() -> None:
    """The scheduler's half, which maps none, has been attached before, and was promised the load."""
    daemon, clock = MemoryDaemon(LARGE, blocks=4), Clock()
    _, places = filled_worker(daemon, clock)
    worker = worker_of(daemon, daemon.layout, clock)
    attachment = worker._link._attachment
    attachment.daemon = None  # type: ignore[attr-defined]
    load = Load("r", places, [[5, 6, 7, 8]], 9.0, daemon.ref.incarnation)
    for number, ok in ((1, None), (2, None), (3, True)):
        if ok:
            attachment.daemon = daemon  # type: ignore[attr-defined]
        worker.begin(Step(number, daemon.ref.incarnation, 0, loads=[load] if number == 1 else []))
        worker.load()
        worker.end()
        report = worker.take_ended()
        assert (report and report.loads["r"].ok) is ok
    worker.close()


def test_a_load_from_a_daemon_that_was_here_is_given_up_at_once() -> None:
    daemon, clock = MemoryDaemon(LARGE, blocks=4), Clock()
    worker, places = filled_worker(daemon, clock)
    worker._link._attachment.close()
    worker._link._attachment.daemon = None  # type: ignore[attr-defined]
    load = Load("r", places, [[5, 6, 7, 8]], 9.0, daemon.ref.incarnation)
    worker.begin(Step(2, daemon.ref.incarnation, 0, loads=[load]))
    worker.load()
    worker.end()
    report = worker.take_ended()
    assert report is not None and report.loads["r"].reason == "pdxd is gone"
    worker.close()


def test_nothing_happens_between_steps(daemon: MemoryDaemon, clock: Clock) -> None:
    worker = worker_of(daemon, LAYOUT, clock)
    worker.end()
    worker.save_layer("layer.0")
    assert worker.take_ended() is None
    assert daemon.received == []
    worker.close()


def test_what_ends_before_there_is_an_arena_is_let_go_when_there_is_one(daemon: MemoryDaemon, clock: Clock) -> None:
    """The scheduler has said that it is saved, and speaks of it no more."""
    places = opened(daemon, 1)
    worker = worker_of(daemon, LAYOUT, clock)
    attachment = worker._link._attachment
    attachment.daemon = None  # type: ignore[attr-defined]
    worker.begin(Step(1, daemon.ref.incarnation, 4, saves=[Save(HANDOFF, [(0, (2,), places[0])], last=True, pages=3)]))
    worker.end()
    assert daemon.let_go == []
    attachment.daemon = daemon  # type: ignore[attr-defined]
    for number in (2, 3):
        worker.begin(Step(number, daemon.ref.incarnation, 0))
        worker.end()
    assert [(m.handoff_id, m.ok, m.fence) for m in daemon.let_go] == [(HANDOFF, False, 1)], "once"
    assert daemon.fence(daemon.clients[-1]) >= 1


def test_a_worker_leaves_the_daemon_that_its_scheduler_has_lost_and_no_other(clock: Clock) -> None:
    """It lives, and has taken the engine's rights to slots for gone."""
    daemon = MemoryDaemon(LARGE, blocks=4)
    worker, places = filled_worker(daemon, clock)
    here, first = daemon.ref.incarnation, worker._link.client()
    daemon.arena.set_watermark(places[3].header_offset, 2)
    worker.begin(Step(2, here, 0, loads=[Load("r", places, [[5, 6, 7, 8]], 9.0, here)], left=(1, here + 1)))
    assert worker._link.client() is first
    worker.begin(Step(3, 0, 0, loads=[Load("s", places, [[1, 2, 3, 4]], 9.0, here)], left=(2, here)))
    worker.load()
    worker.end()
    report = worker.take_ended()
    assert report is not None and {load.reason for load in report.loads.values()} == {"pdxd is gone"}
    assert len(report.loads) == 2
    second = worker._link.client()
    assert second is not first
    worker.begin(Step(4, here, 0, left=(2, here)))
    assert worker._link.client() is second
