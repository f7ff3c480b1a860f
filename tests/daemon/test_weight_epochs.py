"""Engines whose weights change: over real sockets, and in one daemon's handoffs where order matters."""

from __future__ import annotations

import errno
import os

import pytest
from daemon.fleet import BareEngine, Fleet, prompt_of, until
from one_host import HASHES, Host
from one_host import engine as engine_of
from test_prefixes import keep, let_go, look_up
from test_tiering import keep_filled

from pdx.client import DaemonClient
from pdx.errors import TierBroken
from pdx.keys import space_of
from pdx.tiers.disk import DiskTier
from pdx.tiers.memory import MemoryTier
from pdx.verbs import Lookup
from pdx.wire import Attach, Keep, LetGo, LoadOpened, LookUp, Reset, SendEnded, SendOpened, WeightEpoch

NEW = "cd" * 16
PROMPT = prompt_of(64)


def kept(engine: BareEngine, called: bytes = b"k" * 16) -> None:
    engine.scheduler.send(Keep(request_id="k", handoff_id=called, block_hashes=PROMPT.hashes))
    opened = engine.expect(SendOpened)
    engine.fill(opened, PROMPT, list(range(len(PROMPT.hashes))))
    engine.let_go(called, "send")
    engine.daemon.wait_unleased()


def hits(engine: BareEngine) -> int:
    called = os.urandom(16)  # of its own: the end of another engine's load may come later than this look-up
    engine.scheduler.send(LookUp(request_id="l", handoff_id=called, block_hashes=PROMPT.hashes))
    found = len(engine.expect(LoadOpened).places)
    if found:
        engine.let_go(called, "load")
    return found


def test_engines_share_blocks_while_their_weights_are_equal(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    one, two = fleet.engine(daemon, "one"), fleet.engine(daemon, "two")
    kept(one)
    assert (hits(one), hits(two)) == (4, 4)
    one.scheduler.send(WeightEpoch(epoch=NEW))
    assert (hits(one), hits(two)) == (0, 4)
    kept(one)
    two.scheduler.send(WeightEpoch(epoch="ef" * 16))
    assert (hits(one), hits(two)) == (4, 0)
    two.scheduler.send(WeightEpoch(epoch=NEW))
    assert hits(two) == 4
    one.scheduler.send(WeightEpoch(epoch=""))
    assert hits(one) == 4, "what the files' weights made is still there"
    assert daemon.counter("weight_changes") == 4


def test_a_reset_clears_one_kind_of_blocks_for_all(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    one, two = fleet.engine(daemon, "one"), fleet.engine(daemon, "two")
    kept(one)
    two.scheduler.send(WeightEpoch(epoch=NEW))
    kept(two)
    one.scheduler.send(Reset(epoch=""))
    assert (hits(one), hits(two)) == (0, 4)
    one.scheduler.send(Reset(epoch=NEW))
    until(lambda: hits(two) == 0, "those of another epoch are cleared, too")


def test_only_the_scheduler_says_so(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    engine = fleet.engine(daemon, "one")
    kept(engine)
    engine.worker.send(WeightEpoch(epoch=NEW))
    engine.worker.send(Reset(epoch=""))
    until(lambda: daemon.counter("messages_of_tools") == 2, "a worker is not heard")
    assert hits(engine) == 4


def test_a_worker_that_attaches_late_finds_the_epoch_of_its_engine(fleet: Fleet) -> None:
    """After a daemon's restart the scheduler may be there, and speak, before all ranks are."""
    daemon = fleet.daemon()
    engine = fleet.engine(daemon, "one", ranks=2)
    for each in (engine.scheduler, *engine.workers):
        each.close()
    until(lambda: not daemon.stats()["engines"], "it has left")
    scheduler = DaemonClient.attach(daemon.config, Attach(kind="scheduler", engine=engine.info), start=False)
    first = engine.attach_worker(0)
    scheduler.send(WeightEpoch(epoch=NEW))
    until(lambda: daemon.counter("weight_changes") == 1, "it is known")
    second = engine.attach_worker(1)
    until(lambda: daemon.stats()["engines"]["one"]["complete"], "the ranks are taken to be alike")
    engine.scheduler, engine.workers = scheduler, [first, second]
    kept(engine)
    assert hits(engine) == 4
    scheduler.send(WeightEpoch(epoch=""))
    assert hits(engine) == 0


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_handoff_ends_when_either_side_has_new_weights(fleet: Fleet, side: str) -> None:
    here, there = fleet.daemon(), fleet.daemon()
    prefill, decode = fleet.engine(here, "P"), fleet.engine(there, "D")
    opened = prefill.open_send(PROMPT, fleet.handle(prefill, decode))
    prefill.fill(opened, PROMPT, [0])
    until(lambda: there.counter("pages_landed"), "decode has granted it before anything changes")
    (prefill if side == "prefill" else decode).scheduler.send(WeightEpoch(epoch=NEW))
    assert "weights have changed" in prefill.expect(SendEnded).reason
    prefill.let_go(opened.handoff_id, "send", ok=False)
    for daemon in (here, there):
        daemon.wait_unleased()


def test_engines_of_different_epochs_hand_nothing_over(fleet: Fleet) -> None:
    """The router pairs none; a handle that it made before the update is no good after it."""
    here, there = fleet.daemon(), fleet.daemon()
    prefill, decode = fleet.engine(here, "P"), fleet.engine(there, "D")
    handle = fleet.handle(prefill, decode)
    decode.scheduler.send(WeightEpoch(epoch=NEW))
    until(lambda: there.counter("weight_changes") == 1, "decode has new weights")
    opened = prefill.open_send(PROMPT, handle)
    assert "model contents differ" in prefill.expect(SendEnded).reason
    prefill.let_go(opened.handoff_id, "send", ok=False)
    prefill.scheduler.send(WeightEpoch(epoch=NEW))
    handle = fleet.handle(prefill, decode)
    prefill.prefill(PROMPT, handle)
    assert decode.load(PROMPT, handle) == len(PROMPT.names), "the same weights on both sides"


# --- one daemon's handoffs ------------------------------------------------------------------------------------------


def test_what_was_claimed_before_is_never_kept() -> None:
    """Its engine says that all is well, in a message that has overtaken the news or has been overtaken by it."""
    host = Host()
    engine = engine_of("P")
    opened = keep(host)
    assert isinstance(opened, SendOpened)
    host.handoffs.weights_changed(engine, NEW, host.now)
    let_go(host)
    assert look_up(host) == []
    assert engine.info.content.weight_epoch == NEW
    assert not host.store.leases and "blocks_kept" not in host.counters


def test_an_epoch_that_is_known_ends_nothing() -> None:
    """An engine tells a new daemon of its epoch once more, which may be after its first request."""
    host = Host()
    keep(host)
    host.handoffs.weights_changed(engine_of("P"), engine_of("P").info.content.weight_epoch, host.now)
    let_go(host)
    assert look_up(host)
    assert "weight_changes" not in host.counters


def test_a_load_of_before_is_no_longer_renewed() -> None:
    host = Host()
    keep(host)
    let_go(host)
    assert look_up(host)
    host.handoffs.weights_changed(engine_of("P"), NEW, host.now)
    host.tick(40.0)
    host.tick(40.0)
    assert [type(message).__name__ for message in host.heard["P"]] == ["LoadEnded"], "it is asked to let go"
    host.heard["P"].clear()
    host.handoffs.let_go("P", LetGo(handoff_id=b"m" * 16, side="load", fence=1, ok=False), host.now)
    host.tick()
    assert not host.store.leases


def test_a_reset_clears_the_arena_beside_a_disk_that_could_not_be_opened() -> None:
    tier = DiskTier.off(TierBroken("broken", errno.EIO), cap_bytes=8 << 20)
    host = Host(tier=tier)
    host.handoffs.spaces.met(engine_of("P"))
    keep_filled(host)
    host.handoffs.reset(engine_of("P"), "", host.now)
    assert look_up(host) == []
    tier.close(drain_s=0.0)


@pytest.mark.parametrize("unseen", ["", "1 folders could not be read"])
def test_a_reset_reaches_the_disk(tier: MemoryTier, unseen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what of it is known: what may come to light in a later life is no reason to leave that."""
    monkeypatch.setattr(MemoryTier, "unseen", unseen)
    host = Host(tier=tier)
    engine = engine_of("P")
    host.handoffs.spaces.met(engine)
    keep_filled(host)
    for _ in range(4):
        host.tick()
    space = space_of(engine.info.content, engine.info.layout)
    assert tier.stats().blocks == len(HASHES)
    host.handoffs.reset(engine, "", host.now)
    assert host.handoffs.steer(Lookup(space=space, block_hashes=HASHES), host.now).blocks == 0  # type: ignore[union-attr]
    assert (tier.stats().blocks, host.counters["resets"]) == (0, 1)
