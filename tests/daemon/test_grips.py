"""Engines' rights to slots: when they end, and how much of that a look costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from counted import growth
from one_host import PAGES, Host, engine

from pdx.verbs import Pin
from pdx.wire import Keep, LetGo, LookUp, SendOpened


class Fences:
    """Of all engines of a host, and how often somebody has looked at one."""

    def __init__(self, host: Host) -> None:
        self.at, self.looks = 0, 0
        desk = host.handoffs._desk
        desk.ports = replace(desk.ports, fence_passed=self._passed)

    def _passed(self, engine_id: str, step: int) -> bool:
        self.looks += 1
        return self.at >= step


@pytest.fixture
def host() -> Host:
    return Host(extents=8)


@pytest.fixture
def fences(host: Host) -> Fences:
    return Fences(host)


def keep(host: Host, called: int, *, ranks: int = 1) -> None:
    """Room for one block, in which the engine has written nothing yet."""
    message = Keep(request_id=f"k{called}", handoff_id=b"%016d" % called, block_hashes=[b"%032d" % called])
    keeper = engine("P")
    keeper.info = msgspec.structs.replace(keeper.info, layout=msgspec.structs.replace(keeper.info.layout, ranks=ranks))
    host.handoffs.keep(keeper, message, host.now)
    assert isinstance(host.heard["P"].pop(), SendOpened)


def let_go(host: Host, called: int, fence: int, *, rank: int | None = None, ok: bool = False) -> None:
    message = LetGo(handoff_id=b"%016d" % called, side="send", fence=fence, ok=ok)
    host.handoffs.let_go("P", message, host.now, rank=rank)


def test_many_that_wait_for_a_fence_cost_a_look_each_and_one_a_turn(host: Host, fences: Fences) -> None:
    """A step of seconds ends with thousands of them, and the loop turns every two milliseconds meanwhile."""
    for called in range(50):
        keep(host, called)
    for called in range(50):
        let_go(host, called, fence=1)
    assert (fences.looks, len(host.store.leases)) == (50, 50)
    for _ in range(10):
        host.tick(0.002)
    assert (fences.looks, len(host.store.leases)) == (60, 50)
    fences.at = 1
    host.tick(0.002)
    assert not host.store.leases and not host.handoffs.fences_pending


def test_each_ends_with_its_own_fence_in_whatever_order_they_were_said(host: Host, fences: Fences) -> None:
    for called, fence in enumerate((3, 1, 2, 1)):
        keep(host, called)
        let_go(host, called, fence=fence)
        let_go(host, called, fence=0)  # said again: the first word counts
    for at, left in ((0, 4), (1, 2), (2, 1), (3, 0)):
        fences.at = at
        host.tick()
        assert len(host.store.leases) == left


def test_one_whose_fence_has_passed_ends_at_once_whoever_else_waits(host: Host, fences: Fences) -> None:
    for called, fence in enumerate((9, 0)):
        keep(host, called)
        let_go(host, called, fence=fence)
    assert len(host.store.leases) == 1


@pytest.mark.parametrize("failed", [0, 1])
def test_all_ranks_fences_pass_before_their_slots_are_free(host: Host, fences: Fences, failed: int) -> None:
    """Whichever of them has failed, and said so with an earlier one."""
    keep(host, 0, ranks=2)
    for rank in (1, 0):
        let_go(host, 0, fence=5 if rank == failed else 7, rank=rank, ok=rank != failed)
    fences.at = 5
    host.tick()
    assert len(host.store.leases) == 1, "the other's worker may touch them still"
    fences.at = 7
    host.tick()
    assert not host.store.leases


def test_an_engine_that_is_gone_leaves_nothing_for_its_namesake(host: Host, fences: Fences) -> None:
    keep(host, 0)
    let_go(host, 0, fence=9)
    host.handoffs.engine_gone("P", host.now)
    assert not host.store.leases and not host.handoffs.fences_pending
    keep(host, 0)
    fences.at = 9
    host.tick()
    assert len(host.store.leases) == 1


@pytest.mark.parametrize("pinned", [False, True])
def test_leases_that_expire_together_cost_the_same_each(pinned: bool) -> None:
    """Those of an engine that has stopped, or of thousands of pins that were made at once."""

    def expiring(leases: int) -> Callable[[], object]:
        host = Host()
        keeper = engine("P")
        host.handoffs.spaces.met(keeper)
        keep(host, 0)
        (slot,) = host.store.slots.values()
        host.store.arena.set_watermark(slot.places[0].header_offset, PAGES.layers)
        host.handoffs.let_go("P", LetGo(handoff_id=b"%016d" % 0, side="send", fence=0, ok=True), host.now)
        (spot,) = dict(host.store.index.items())
        for number in range(leases):
            if pinned:  # those that were pinned first last longest
                ttl_s = 60.0 if number < leases / 2 else 30.0
                pin = Pin(name=f"p{number}", ttl_s=ttl_s, space=spot[0], block_hashes=[spot[1]])
                host.handoffs.steer(pin, host.now)
            else:
                asks = LookUp(request_id="l", handoff_id=b"%016d" % number, block_hashes=[spot[1]])
                host.handoffs.look_up(keeper, asks, host.now)
        assert len(host.store.leases) == leases
        return lambda: host.handoffs.tick(31.0)

    assert growth(expiring) < 5
