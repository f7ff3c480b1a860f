"""The store against a plain model, driven by random calls: whatever the order, what is held stays what it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pdx.buffer.arena import Arena
from pdx.buffer.claim import Claim
from pdx.buffer.lease import Lease, LeaseState, Owner
from pdx.buffer.selection import Selection
from pdx.buffer.slots import Slot, SlotState
from pdx.buffer.store import Store
from pdx.errors import IllegalTransition, Refused
from pdx.layout import CONTROL_BYTES, ExtentPlan, PageLayout, Place

EXTENT_BYTES = 48 << 10
EXTENTS = 3
HANDOFF_SHARE = 0.8
LAYOUTS = (
    PageLayout(layers=2, page_bytes=1000, chunk_blocks=4),
    PageLayout(layers=5, page_bytes=1700, chunk_blocks=2),
)
OWNERS = (Owner(kind="session", name="engine-1"), Owner(kind="wire", name="host-b"), Owner(kind="verb", name="pin"))
TTL_S = 10.0

LAYOUT = st.sampled_from(LAYOUTS)
CHAIN = st.integers(0, 3)
BLOCKS = st.integers(0, 14)


@dataclass
class Prompt:
    """The model's view of a claim."""

    claim: Claim
    layout: PageLayout
    stamp: bytes


class StoreMachine(RuleBasedStateMachine):
    prompts = Bundle("prompts")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena.create(CONTROL_BYTES + EXTENTS * EXTENT_BYTES, populate=False)
        self.store = Store(self.arena, extent_bytes=EXTENT_BYTES, handoff_share=HANDOFF_SHARE, poison=True)
        self.now = 0.0
        self.stamps = 0
        self.held: dict[int, tuple[Lease, dict[Place, bytes]]] = {}  # by lease id: what its pages must contain
        self.contents: dict[Place, bytes] = {}

    def teardown(self) -> None:
        try:
            for lease, _ in list(self.held.values()):
                self.end(lease)
            while self.store.cleared:
                self.store.drop_cleared()
            assert all(slot.state is SlotState.READY and slot.indexed for slot in self.store.slots.values())
            for layout in LAYOUTS:
                self.claim_everything(layout)
        finally:
            self.arena.close()

    def claim_everything(self, layout: PageLayout) -> None:
        """With nothing held, the largest prompt allowed fits, whatever is cached."""
        blocks = allowed_blocks(layout)
        hashes = [b"all" + bytes([number]) for number in range(blocks)]
        claim = self.store.claim(OWNERS[0], b"all", layout, hashes, tail=False, now=self.now, ttl_s=TTL_S)
        assert claim and len(claim.fresh) == blocks
        self.store.check_integrity()
        self.store.release(claim.lease)
        assert self.store.extents.reachable(layout) == self.store.extents.capacity(layout)

    @rule(target=prompts, layout=LAYOUT, chain=CHAIN, blocks=BLOCKS, tail=st.booleans())
    def claim(self, layout: PageLayout, chain: int, blocks: int, tail: bool) -> object:
        return self.claimed(layout, chain, blocks, tail) or multiple()

    @rule(layout=LAYOUT, chain=CHAIN, blocks=BLOCKS)
    def cache(self, layout: PageLayout, chain: int, blocks: int) -> None:
        prompt = self.claimed(layout, chain, blocks, tail=False)
        if prompt:
            self.write_and_commit(prompt)
            self.end(prompt.claim.lease)

    def claimed(self, layout: PageLayout, chain: int, blocks: int, tail: bool) -> Prompt | None:
        namespace, hashes = chain_of(layout, chain, blocks)
        total = len(hashes) + tail
        found = self.store.index.find(namespace, hashes) + [None] * tail
        room = self.room(layout, {spot[0] for spot in found if spot})
        before = self.snapshot()
        try:
            claim = self.store.claim(OWNERS[0], namespace, layout, hashes, tail=tail, now=self.now, ttl_s=TTL_S)
        except Refused:
            assert total > allowed_blocks(layout)
            assert self.snapshot() == before
            return None
        assert (claim is not None) == (found.count(None) <= room)
        if claim is None:
            assert self.snapshot() == before
            return None
        assert len(claim.places) == total
        assert claim.fresh == {index for index in range(total) if found[index] is None}
        self.check_fresh_places_are_nobodys(claim)
        self.remember(claim.lease, claim.places)
        self.stamps += 1
        return Prompt(claim, layout, stamp=bytes([self.stamps % 256]))

    @rule(target=prompts, layout=LAYOUT, chain=CHAIN, blocks=BLOCKS)
    def claim_each(self, layout: PageLayout, chain: int, blocks: int) -> object:
        """As many as fit, whatever must go for them."""
        namespace, hashes = chain_of(layout, chain, blocks)
        missing = [name for name in hashes if self.store.index.find(namespace, [name]) == [None]]
        room = self.room(layout, ())
        claims = self.store.claim_each(OWNERS[1], namespace, layout, missing, now=self.now, ttl_s=TTL_S)
        assert len(claims) == min(room, len(missing))
        for claim in claims:
            self.check_fresh_places_are_nobodys(claim)
            self.remember(claim.lease, claim.places)
        self.stamps += 1
        stamp = bytes([self.stamps % 256])
        return multiple(*(Prompt(claim, layout, stamp) for claim in claims))

    def room(self, layout: PageLayout, shared: Iterable[Slot]) -> int:
        """Counted from scratch: what a claim that shares these slots could still get."""
        kept = {slot for lease, _ in self.held.values() for slot in lease.slots} | set(shared)
        room = 0
        for number in range(EXTENTS):
            start = CONTROL_BYTES + number * EXTENT_BYTES
            inside = [slot for slot in kept if start <= slot.run.offset < start + EXTENT_BYTES]
            if all(slot.layout == layout for slot in inside):
                room += ExtentPlan(layout, EXTENT_BYTES).units - sum(slot.blocks for slot in inside)
        return room

    def check_fresh_places_are_nobodys(self, claim: Claim) -> None:
        held = {slot.run.offset for lease, _ in self.held.values() for slot in lease.slots}
        for index in claim.fresh:
            place = claim.places[index]
            assert place.slot_offset not in held, "a held slot was handed out again"
            self.contents.pop(place, None)
            for header_word in (self.arena.watermark(place.header_offset), self.arena.checksum(place, 0)):
                assert header_word == 0

    @rule(prompt=prompts)
    def write_and_commit(self, prompt: Prompt) -> None:
        can_commit = all(slot.state is SlotState.FILLING for slot in prompt.claim.fresh_slots)
        if can_commit:
            self.write(prompt)
        try:
            self.store.commit(prompt.claim)
            assert can_commit
        except IllegalTransition:
            assert not can_commit

    def write(self, prompt: Prompt) -> None:
        for index in prompt.claim.fresh:
            place = prompt.claim.places[index]
            for layer in range(prompt.layout.layers):
                start = place.page_offset(prompt.layout, layer)
                page = prompt.stamp * prompt.layout.page_bytes
                self.arena.memory[start : start + prompt.layout.page_bytes] = page
            self.contents[place] = prompt.stamp
        for lease, pages in self.held.values():
            for slot in lease.slots:
                pages.update({place: self.contents[place] for place in slot.places if place in self.contents})

    @rule(prompt=prompts)
    def abandon(self, prompt: Prompt) -> None:
        can_abandon = all(slot.state is SlotState.FILLING for slot in prompt.claim.fresh_slots)
        try:
            self.store.abandon(prompt.claim)
            assert can_abandon
        except IllegalTransition:
            assert not can_abandon

    @rule(prompt=prompts, owner=st.sampled_from(OWNERS), first=st.integers(0, 5))
    def lease_places(self, prompt: Prompt, owner: Owner, first: int) -> None:
        usable = all(
            slot.state in (SlotState.FILLING, SlotState.READY) and self.store.slots.get(slot.run.offset) is slot
            for slot in prompt.claim.lease.slots
        )
        source = prompt.claim if first == 0 else prompt.claim.places[:first]
        try:
            lease = self.store.lease(source, owner, now=self.now, ttl_s=TTL_S)
        except IllegalTransition:
            assert not usable
        else:
            self.remember(lease, prompt.claim.places if first == 0 else source)

    @rule(layout=LAYOUT, chain=CHAIN, blocks=BLOCKS)
    def read(self, layout: PageLayout, chain: int, blocks: int) -> None:
        namespace, hashes = chain_of(layout, chain, blocks)
        known = [spot is not None for spot in self.store.index.find(namespace, hashes)] + [False]
        read = self.store.read(OWNERS[1], namespace, hashes, now=self.now, ttl_s=TTL_S)
        assert (len(read.places) if read else 0) == known.index(False)
        if read:
            self.remember(read.lease, read.places)

    @rule(layout=LAYOUT, chain=CHAIN, blocks=BLOCKS)
    def copy(self, layout: PageLayout, chain: int, blocks: int) -> None:
        """It holds as any lease does, and what goes first stays what goes first."""
        namespace, hashes = chain_of(layout, chain, blocks)
        spots = [spot for spot in self.store.index.find(namespace, hashes) if spot]
        places = tuple(slot.places[position] for slot, position in spots)
        before = list(self.store.policy.victims())
        lease = self.store.lease_to_copy(places, OWNERS[1], now=self.now, ttl_s=TTL_S)
        assert list(self.store.policy.victims()) == before
        self.remember(lease, places)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        self.end(self.held[data.draw(st.sampled_from(sorted(self.held)))][0])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        lease, _ = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        assert self.store.renew(lease, now=self.now, ttl_s=TTL_S) == (lease.state is LeaseState.LIVE)

    @rule(seconds=st.floats(0.5, 4.0))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        due = {lease for lease, _ in self.held.values() if lease.state is LeaseState.LIVE}
        due = {lease for lease in due if lease.expires_at <= self.now}
        assert set(self.store.expire(self.now)) == due

    @rule(layout=LAYOUT, chain=CHAIN, blocks=BLOCKS, is_whole=st.booleans(), older_s=st.sampled_from([0.0, TTL_S]))
    def clear(self, layout: PageLayout, chain: int, blocks: int, is_whole: bool, older_s: float) -> None:
        namespace, hashes = chain_of(layout, chain, blocks)
        names = None if is_whole else frozenset(hashes)
        which = Selection(spaces=frozenset({namespace}), tenant=b"", block_hashes=names, older_s=older_s)
        before, found = self.snapshot(), len(self.store.index)
        surveyed = self.store.survey(which, now=self.now)
        assert self.snapshot() == before
        used_bytes = self.store.stats()["used_bytes"]
        freed = set(self.store.cleared)
        cleared = self.store.clear(which, now=self.now)
        assert cleared == surveyed
        assert len(self.store.index) == found - len(cleared.blocks)
        if not cleared.held:
            # Whole slots: of one of which a part was cleared before, more becomes free than is cleared now.
            freed |= {slot for slot, _ in cleared.blocks if not slot.indexed}
            freed -= self.store.cleared.keys()  # soon
            assert self.store.stats()["used_bytes"] == used_bytes - sum(slot.size_bytes for slot in freed)
            assert not freed & set(self.store.slots.values())
        again = self.store.survey(which, now=self.now)
        assert (again.blocks, again.filling) == ((), ())
        if not older_s:
            assert not any(self.store.index.find(namespace, hashes))

    def remember(self, lease: Lease, places: tuple[Place, ...]) -> None:
        self.held[lease.lease_id] = (
            lease,
            {place: self.contents[place] for place in places if place in self.contents},
        )

    def end(self, lease: Lease) -> None:
        before = list(self.store.policy.victims())
        if lease.state is LeaseState.LIVE:
            self.store.release(lease)
        else:
            self.store.quiesce(lease)
        self.store.release(lease)
        if not lease.is_use:
            assert list(self.store.policy.victims()) == before
        del self.held[lease.lease_id]

    def snapshot(self) -> object:
        return self.store.stats(), {slot: (slot.state, slot.holds) for slot in self.store.slots.values()}

    @invariant()
    def accounts_add_up(self) -> None:
        self.store.check_integrity()

    @invariant()
    def what_is_held_stays_what_it_was(self) -> None:
        for lease, pages in self.held.values():
            for slot in lease.slots:
                for place in slot.places:
                    assert self.arena.generation(place.header_offset) == place.generation
                for place in slot.places:
                    if place in pages:
                        for layer in (0, slot.layout.layers - 1):
                            start = place.page_offset(slot.layout, layer)
                            page = self.arena.memory[start : start + slot.layout.page_bytes]
                            assert page[0] == page[-1] == pages[place][0]


def chain_of(layout: PageLayout, chain: int, blocks: int) -> tuple[bytes, list[bytes]]:
    """Namespace and hashes of a prompt; prompts of one chain share their first blocks."""
    return bytes([LAYOUTS.index(layout), chain]), [bytes([chain, number]) for number in range(blocks)]


def allowed_blocks(layout: PageLayout) -> int:
    return int(ExtentPlan(layout, EXTENT_BYTES).units * EXTENTS * HANDOFF_SHARE)


StoreMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase


@pytest.mark.prove
@pytest.mark.timeout(7200)
def test_a_million_operations() -> None:
    run_state_machine_as_test(StoreMachine, settings=settings(StoreMachine.TestCase.settings, max_examples=20_000))
