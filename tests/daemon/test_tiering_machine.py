"""The arena and a slow, failing tier under both policies and both write modes, driven by random calls.

Whatever the order: who loads gets the bytes that were kept, what is cleared never comes back, what goes early is below
or was refused, and in the end nothing is leased.
"""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from one_host import HERE, PAGES, Host, engine
from slow_tier import SlowTier
from test_prefixes import keep, let_go, look_up
from test_steering import SPACE, clear

from pdx.buffer.policies import POLICIES
from pdx.buffer.slots import Slot
from pdx.buffer.water import Waterline
from pdx.config import Eviction
from pdx.daemon.holdings import HoldingsTeller
from pdx.keys import short_names
from pdx.layout import Place
from pdx.tiers.spill import WriteMode
from pdx.wire import ARENA_BIT, DISK_BIT, SendOpened

STEM, BLOCKS = st.integers(0, 5), st.integers(1, 6)
CHAINS = [[b"%d/%d" % (stem, block) for block in range(6)] for stem in range(6)]


FLAT = [name for chain in CHAINS for name in chain]
SHORT = short_names(SPACE, FLAT)


def page_of(name: bytes, layer: int) -> bytes:
    return hashlib.blake2b(name + bytes([layer]), digest_size=PAGES.page_bytes).digest()


class TieringMachine(RuleBasedStateMachine):
    policy: Eviction = "lru"
    mode = WriteMode.THROUGH

    def __init__(self) -> None:
        super().__init__()
        self.tier = SlowTier(cap_bytes=1 << 20)
        line = Waterline(low=0.3, high=0.5, batch=3)
        self.host = Host(extents=1, tier=self.tier, policy=self.policy, write_mode=self.mode, waterline=line)
        self.teller = HoldingsTeller(HERE, self.host.store.index, self.tier)
        self.host.handoffs.spaces.met(engine("P"))
        self.store = self.host.store
        self.loads: dict[bytes, tuple[list[bytes], list[Place]]] = {}
        self.gone: set[bytes] = set()  # cleared, and not kept again
        self.named = 0
        self._evict, self.store.evict = self.store.evict, self.checked_evict  # type: ignore[method-assign]

    def checked_evict(self, slots: list[Slot]) -> None:
        for slot in slots:
            keys = self.store.index.keys_of(slot)
            for key, is_below in zip(keys, self.tier.contains(keys), strict=True):
                assert is_below or self.tier.state != "well" or key[1] in self.tier.refused, "it was nowhere else"
        self._evict(slots)

    def teardown(self) -> None:
        self.tier.takes, self.tier.refuses, self.tier.pace = True, False, 100
        for called in list(self.loads):
            self.end(called)
        for _ in range(20):  # while there is little room, each of them writes
            self.host.tick()
        assert not self.store.leases
        self.tier.close(drain_s=0.0)

    def name(self) -> bytes:
        self.named += 1
        return b"%16d" % self.named

    @rule(stem=STEM, blocks=BLOCKS, ok=st.sampled_from([True, True, True, False]))
    def keeps(self, stem: int, blocks: int, ok: bool) -> None:
        hashes, called = CHAINS[stem][:blocks], self.name()
        opened = keep(self.host, hashes, called)
        if not isinstance(opened, SendOpened):
            return
        for place, name in zip(opened.places, hashes, strict=True):
            for layer in range(PAGES.layers if place is not None else 0):
                start = place.page_offset(PAGES, layer)
                self.store.arena.memory[start : start + PAGES.page_bytes] = page_of(name, layer)
        if ok:
            self.gone -= set(hashes)
        let_go(self.host, called, ok=ok)
        self.host.heard["P"].clear()

    @rule(stem=STEM, blocks=BLOCKS)
    def loads_some(self, stem: int, blocks: int) -> None:
        called = self.name()
        places = look_up(self.host, CHAINS[stem][:blocks], called)
        names = CHAINS[stem][: len(places)]
        assert not self.gone & set(names), "it was cleared"
        if places:
            self.loads[called] = names, places

    @rule(spoilt=st.booleans())
    def ends_one(self, spoilt: bool) -> None:
        if self.loads:
            self.end(next(iter(self.loads)), spoilt=spoilt)

    def end(self, called: bytes, *, spoilt: bool = False) -> None:
        _, places = self.loads.pop(called)
        let_go(self.host, called, side="load", ok=not spoilt, spoilt=[len(places) - 1] if spoilt else [])
        self.host.heard["P"].clear()

    @rule(stem=STEM, tiers=st.sampled_from(["all", "all", "disk"]))
    def clears(self, stem: int, tiers: str) -> None:
        if any(set(names) & set(CHAINS[stem]) for names, _ in self.loads.values()):
            return  # its blocks may be on their way up
        clear(self.host, spaces=[SPACE], tenant=b"", block_hashes=CHAINS[stem], tier=tiers)
        if tiers == "all":
            self.gone |= set(CHAINS[stem])

    @rule(pace=st.integers(0, 4), takes=st.booleans(), refuses=st.booleans())
    def the_tier_changes(self, pace: int, takes: bool, refuses: bool) -> None:
        self.tier.pace, self.tier.takes, self.tier.refuses = pace, takes, refuses

    @rule(state=st.sampled_from(["well", "well", "paused"]))
    def its_health_changes(self, state: str) -> None:
        self.tier.state = state

    @rule(times=st.integers(1, 4))
    def ticks(self, times: int) -> None:
        for _ in range(times):
            self.host.tick()
        self.host.heard["P"].clear()

    @invariant()
    def what_has_come_is_right(self) -> None:
        arena = self.store.arena
        for names, places in self.loads.values():
            for name, place in zip(names, places, strict=True):
                assert arena.generation(place.header_offset) == place.generation
                for layer in range(arena.watermark(place.header_offset)):
                    start = place.page_offset(PAGES, layer)
                    assert bytes(arena.memory[start : start + PAGES.page_bytes]) == page_of(name, layer)

    @invariant()
    def what_was_cleared_is_nowhere(self) -> None:
        keys = [(SPACE, name) for name in sorted(self.gone)]
        assert not any(self.tier.contains(keys))
        assert not any(self.store.index.find(SPACE, sorted(self.gone)))

    @invariant()
    def routers_would_be_told_what_is_kept(self) -> None:
        here, below = self.store.index.find(SPACE, FLAT), self.tier.contains([(SPACE, name) for name in FLAT])
        kept = {
            name: ARENA_BIT * bool(spot) | DISK_BIT * is_below
            for name, spot, is_below in zip(SHORT, here, below, strict=True)
            if spot or is_below
        }
        self.teller._name_some()
        assert self.teller._tiers == kept

    @invariant()
    def what_is_on_its_way_up_is_counted_for_who_waits_for_it(self) -> None:
        tiering = self.host.handoffs._tiering
        assert tiering is not None
        promotions = tiering._promotions.values()
        assert tiering.queued_bytes == sum(promotion.pages.block_bytes for promotion in promotions)
        waits = {(load, promotion) for promotion in promotions for load in promotion.asked_by}
        assert waits == {(load, promotion) for load, theirs in tiering._by_load.items() for promotion in theirs}
        assert all(tiering._by_load.values())

    @invariant()
    def accounts_add_up(self) -> None:
        self.store.check_integrity()
        self.tier.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", WriteMode)
def test_whatever_the_order(policy: Eviction, mode: WriteMode) -> None:
    machine = type("Machine", (TieringMachine,), {"policy": policy, "mode": mode})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=60, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
