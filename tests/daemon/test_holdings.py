"""What a daemon keeps, as routers get to know it: over links that lose, restart and stand still."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from counted import growth
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from one_host import HASHES, HERE, Host, engine

from pdx.buffer.index import Index
from pdx.daemon import holdings
from pdx.daemon.holdings import HoldingsTeller
from pdx.keys import short_names, space_of, tenant_of
from pdx.router.choice.knowledge import Found, Knowledge
from pdx.tiers.conformance import buffers, key_of
from pdx.tiers.disk import DiskTier
from pdx.tiers.faulty import FaultyFiles
from pdx.tiers.folder import Folder
from pdx.tiers.folder import Found as FoundFile
from pdx.tiers.memory import MemoryTier
from pdx.tiers.sealed import name_of
from pdx.tiers.tier import StateChanged, Write
from pdx.wire import ARENA_BIT, DISK_BIT, Holdings

KEYS = [(b"n" * 24, b"%032d" % n) for n in range(12)]
NAMES = [short_names(namespace, [name])[0] for namespace, name in KEYS]
DAEMON = HERE.daemon_id


class Link:
    """From a daemon to one router, which can be lost (full queue), and replaced by a router that knows nothing."""

    def __init__(self) -> None:
        self.knowledge = Knowledge()
        self.takes = True
        self.loses = False
        self.wants_anew = False

    def send(self, router: str, message: Holdings) -> bool:
        if not self.takes:
            return False
        if not self.loses and not self.knowledge.on_holdings(message):
            self.wants_anew = True
        return True


class HoldingsMachine(RuleBasedStateMachine):
    """Blocks come and go in two tiers; after some quiet turns every router knows all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.teller = HoldingsTeller(HERE, self.index, None)
        self.links = {"r0": Link(), "r1": Link()}
        self.truth = dict.fromkeys(NAMES, 0)
        self.disk_finds = True
        self.now = 0.0

    @rule(block=st.sampled_from(range(len(KEYS))), arena=st.booleans(), found=st.booleans())
    def changes(self, block: int, arena: bool, found: bool) -> None:
        bit = ARENA_BIT if arena else DISK_BIT
        if arena:
            self.index.told(KEYS[block], found)
        else:
            self.teller._on_disk("0" * 32 + f"{NAMES[block]:016x}" + "0" * 16, found)
        self.truth[NAMES[block]] = self.truth[NAMES[block]] | bit if found else self.truth[NAMES[block]] & ~bit

    @rule(finds=st.booleans())
    def the_disk_hangs_or_answers(self, finds: bool) -> None:
        if finds != self.disk_finds:
            self.disk_finds = finds
            self.teller._on_all_of_disk(finds)

    @rule(router=st.sampled_from(["r0", "r1"]), takes=st.booleans(), loses=st.booleans())
    def a_link_changes(self, router: str, takes: bool, loses: bool) -> None:
        self.links[router].takes, self.links[router].loses = takes, loses

    @rule(router=st.sampled_from(["r0", "r1"]))
    def a_router_starts_anew(self, router: str) -> None:
        self.links[router].knowledge = Knowledge()

    @rule()
    def a_turn(self) -> None:
        self.now += holdings.TURN_S
        self.teller.tick(self.links, lambda router, message: self.links[router].send(router, message), self.now)
        for router, link in self.links.items():
            if link.takes and not link.loses:
                announced = link.knowledge.on_announce(HERE, self.teller.number(router))
                if link.wants_anew or not announced:
                    self.teller.resync(router)
                link.wants_anew = False

    @invariant()
    def nobody_believes_what_was_never_so(self) -> None:
        for link in self.links.values():
            link.knowledge.check_integrity()

    def teardown(self) -> None:
        for link in self.links.values():
            link.takes, link.loses = True, False
        for _ in range(3 + round(2 * holdings.ANEW_S / holdings.TURN_S)):
            self.a_turn()
        for link in self.links.values():
            for name, kept in self.truth.items():
                tiers = kept if self.disk_finds else kept & ARENA_BIT
                found = link.knowledge.found([name], 0.0).get(DAEMON, Found())
                assert (found.blocks, found.arena_blocks) == (bool(tiers), bool(tiers & ARENA_BIT))


def test_routers_know_in_the_end_whatever_was_lost() -> None:
    run_state_machine_as_test(HoldingsMachine, settings=settings(max_examples=40, stateful_step_count=30))


def test_a_beginning_comes_in_parts_and_changes_between_them() -> None:
    index = Index()
    teller = HoldingsTeller(HERE, index, None)
    count = holdings.PART_NAMES * (holdings.PARTS_A_TURN + 1)
    keys = [(b"n" * 24, b"%032d" % n) for n in range(count)]
    for key in keys:
        index.told(key, True)
    while teller._nameless:
        teller._name_some()
    link, sent = Link(), []

    def send(router: str, message: Holdings) -> bool:
        sent.append(message)
        return link.send(router, message)

    teller.tick(["r"], send, 0.0)
    assert len(sent) == holdings.PARTS_A_TURN
    index.told(keys[0], False)
    index.told(keys[-1], False)
    teller.tick(["r"], send, 1.0)
    assert len(link.knowledge) == count - 2
    assert [message.number for message in sent] == list(range(len(sent)))
    assert max(len(message.names) for message in sent) <= 8 * holdings.PART_NAMES


def test_what_many_blocks_are_called_is_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are digests, and a clear takes all blocks at once."""
    named: list[int] = []

    def counted(namespace: bytes, hashes: list[bytes]) -> list[int]:
        named.append(len(hashes))
        return short_names(namespace, hashes)

    monkeypatch.setattr(holdings, "short_names", counted)
    monkeypatch.setattr(holdings, "NAMED_A_TURN", 4, raising=False)
    index = Index()
    teller, link = HoldingsTeller(HERE, index, None), Link()
    for found in (True, False):
        for key in KEYS:
            index.told(key, found)
        assert not named
        for turn in range(4):
            teller.tick(["r"] * found, link.send, turn + 9.0 * (not found))
        assert named == [4, 4, 4], "whether or not a router hears of it"
        named.clear()
        assert len(link.knowledge) == len(KEYS)
    teller.tick(["r"], link.send, 20.0)
    index.told(KEYS[0], True)
    index.told(KEYS[0], False)
    teller.tick(["r"], link.send, 21.0)
    assert named == [1], "once for all that has become of it"


def test_a_disk_that_hangs_is_one_word(tmp_path: Path) -> None:
    """It may have a million blocks, and everybody waits for the control thread."""
    with ExitStack() as ends:
        assert growth(lambda blocks: hang_of(blocks, tmp_path / f"{blocks}", ends)) < 1.5


def hang_of(blocks: int, path: Path, ends: ExitStack) -> Callable[[], object]:
    """The turn in which a disk of so many blocks is found to hang; routers know of them all."""
    now = [0.0]
    files = FaultyFiles(Folder.open(path))
    found = [FoundFile(name_of((b"n" * 24, b"%032d" % n)), 8192, 8192, 1) for n in range(blocks)]
    files.scan = lambda: found  # type: ignore[method-assign]
    tier = DiskTier(files, cap_bytes=1 << 30, clock=lambda: now[0], readers=1, writers=1)
    teller, link = HoldingsTeller(HERE, Index(), tier), Link()
    teller.tick(["r"], link.send, 0.0)
    assert len(link.knowledge) == blocks
    ends.callback(tier.close, drain_s=5.0)
    files.gate.clear()
    ends.callback(files.gate.set)
    assert tier.submit(Write(key_of(1), buffers())) is not None
    assert files.waiting.acquire(timeout=5.0)
    now[0] += 31.0

    def turn() -> None:
        (event,) = tier.take_events()
        assert isinstance(event, StateChanged) and event.state == "hung"

    return turn


def test_an_unchanged_daemon_says_nothing_and_a_router_that_leaves_is_forgotten() -> None:
    index = Index()
    teller, link = HoldingsTeller(HERE, index, None), Link()
    index.told(KEYS[0], True)
    for turn in range(5):
        teller.tick(["r"], link.send, turn * 1.0)
    assert teller.number("r") == 1
    teller.tick(["other"], link.send, 9.0)
    assert (teller.number("r"), teller.number("other")) == (0, 1)


def test_nothing_is_kept_for_a_router_when_there_is_none_and_one_that_comes_back_hears_of_what_is_there() -> None:
    index = Index()
    teller, link = HoldingsTeller(HERE, index, None), Link()
    index.told(KEYS[0], True)
    teller.tick(["r"], link.send, 0.0)
    teller.tick([], link.send, 0.01)
    for key in KEYS[1:]:
        index.told(key, True)
        index.told(key, False)
    assert not teller._changed
    index.told(KEYS[1], True)
    link, sent = Link(), list[Holdings]()
    teller.tick(["r"], lambda router, message: sent.append(message) or link.send(router, message), 1.0)
    assert [message.number for message in sent] == [0]
    assert len(link.knowledge) == 2


def test_what_engines_and_disks_do_is_told() -> None:
    """Blocks that were prefilled, written below, and evicted; and what a disk had before this daemon's life."""
    tier = MemoryTier(cap_bytes=1 << 20)
    host = Host(tier=tier)
    teller, link = HoldingsTeller(HERE, host.store.index, tier), Link()
    info = engine("P").info
    names = short_names(space_of(info.content, info.layout), HASHES)

    def known() -> Found | None:
        teller.tick(["r"], link.send, host.now)
        return link.knowledge.found(names, host.now).get(DAEMON)

    assert known() is None
    host.prefill()
    for _ in range(3):
        host.tick(1.0)
    assert known() == Found(3, 3, 3)
    for key in [key for key, _ in host.store.index.items()]:
        assert tier.contains([key]) == [True]
    host.store.evict(list(host.store.slots.values()))
    host.tick(1.0)
    assert known() == Found(3, 0), "they are on the disk"
    tier.remove((space_of(info.content, info.layout), HASHES[1]))
    host.tick(1.0)
    assert known() == Found(1, 0)
    later = HoldingsTeller(HERE, Index(), tier)
    router = Link()
    later.tick(["r"], router.send, 0.0)
    assert router.knowledge.found(names, 0.0) == {DAEMON: Found(1, 0)}
    others = short_names(space_of(info.content, info.layout) + tenant_of("alice"), HASHES)
    assert router.knowledge.found(others, 0.0) == {}, "another tenant's blocks have other names"
    tier.close(drain_s=0.0)
