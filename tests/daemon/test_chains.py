"""A head outlives its tail, in the arena and below, however its blocks came and were used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from one_host import HASHES, PAGES, Host, engine
from test_prefixes import MINE, OTHER, let_go, look_up
from test_tiering import host_space, keep_filled

from pdx.buffer.selection import Selection
from pdx.config import Eviction
from pdx.daemon import chains
from pdx.daemon.chains import QUIET_S
from pdx.tiers.memory import MemoryTier
from pdx.tiers.tier import Key, TierStats
from pdx.wire import Keep, LetGo, SendOpened

CHAIN = [b"c%02d" % n for n in range(12)]
BLOCK_BYTES = 128 + 8 + 2 * 40  # in a tier: payload and meta


class CountingTier(MemoryTier):
    """Counts the names that it is told are used; takes no writes while it is `paused`."""

    names = 0
    paused = False

    def stats(self) -> TierStats:
        return replace(super().stats(), state="paused" if self.paused else "well")

    def used(self, chain: Sequence[Key]) -> None:
        self.names += len(chain)
        super().used(chain)


@pytest.fixture
def narrow() -> Iterator[CountingTier]:
    """Room for 20 blocks."""
    tier = CountingTier(cap_bytes=20 * BLOCK_BYTES)
    yield tier
    tier.check_integrity()
    tier.close(drain_s=0.0)


@pytest.fixture
def host(narrow: CountingTier) -> Host:
    return Host(tier=narrow)


def others(host: Host, count: int, stem: bytes) -> None:
    for n in range(0, count, 4):
        keep_filled(host, [b"%s%d" % (stem, n + m) for m in range(4)], OTHER)


def below(host: Host, tier: MemoryTier, hashes: list[bytes] = CHAIN) -> list[bool]:
    return tier.contains([(host_space(host), block_hash) for block_hash in hashes])


def forget_all_above(host: Host) -> None:
    host.store.clear(Selection(), now=host.now)


def in_lots(host: Host, hashes: list[bytes], *, blocks: int, request: str) -> None:
    for n in range(0, len(hashes), blocks):
        keep_filled(host, hashes[n : n + blocks], b"lot%d" % n, request=request)


def quiet(host: Host) -> None:
    for _ in range(3):
        host.tick(QUIET_S)


def test_a_chain_that_was_read_goes_from_its_end(host: Host, narrow: MemoryTier) -> None:
    keep_filled(host, CHAIN)
    forget_all_above(host)
    assert len(look_up(host, CHAIN)) == 12
    host.tick()
    let_go(host, side="load")
    others(host, 12, b"x")
    assert below(host, narrow) == [True] * 8 + [False] * 4


def test_a_conversation_in_lots_goes_from_its_end_below(host: Host, narrow: MemoryTier) -> None:
    in_lots(host, CHAIN, blocks=2, request="chat")
    quiet(host)
    others(host, 12, b"x")
    assert below(host, narrow) == [True] * 8 + [False] * 4


def test_what_is_used_in_the_arena_stays_below(host: Host, narrow: MemoryTier) -> None:
    """Else whatever comes behind a shared head could not be reached after a restart."""
    keep_filled(host, CHAIN[:4])
    for n in range(6):
        assert len(look_up(host, CHAIN[:4])) == 4
        let_go(host, side="load")
        others(host, 4, b"x%d" % n)
    assert all(below(host, narrow, CHAIN[:4]))


def test_a_turn_behind_a_shared_head_renews_the_head_below(host: Host, narrow: MemoryTier) -> None:
    keep_filled(host, CHAIN[:4])
    for n in range(5):
        keep_filled(host, [*CHAIN[:4], *(b"%d/%d" % (n, m) for m in range(4))])
        quiet(host)
    assert all(below(host, narrow, CHAIN[:4]))


def test_what_was_read_for_nobody_stays_where_it_was(narrow: MemoryTier) -> None:
    ledger = narrow.ledger
    for block in ("head", "tail"):
        ledger.adopt(block, 1)
    ledger.begin_read("head")
    assert not ledger.end_read("head")
    assert list(ledger.policy.victims()) == ["head", "tail"]
    ledger.used(["head", "unknown", "tail"])
    assert list(ledger.policy.victims()) == ["tail", "head"]
    ledger.check_integrity()


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_conversation_in_lots_goes_from_its_end_in_the_arena(policy: Eviction, blocks: int) -> None:
    host = Host(policy=policy)
    keep_filled(host, CHAIN[:4], request="chat")
    in_lots(host, CHAIN[4:], blocks=blocks, request="chat")
    quiet(host)
    found = host.store.index.find(host_space(host), CHAIN)
    for n in range(host.store.extents.capacity(PAGES)):
        keep_filled(host, [b"x%d" % n], OTHER)
        now_found = [spot is not None for spot in host.store.index.find(host_space(host), CHAIN)]
        assert now_found == sorted(now_found, reverse=True), "behind a gap no block is of use"
        if sum(now_found) <= 4:
            break
    assert all(found) and 0 < sum(now_found) <= 4


def test_growing_is_no_use() -> None:
    """Or every prompt with a long answer would stay as if it had been asked for twice."""
    host = Host(policy="s3fifo")
    keep_filled(host, CHAIN[:2])
    look_up(host, CHAIN[:2])
    let_go(host, side="load")
    in_lots(host, CHAIN[2:], blocks=2, request="chat")
    quiet(host)
    for n in range(host.store.extents.capacity(PAGES)):
        keep_filled(host, [b"x%d" % n], OTHER)
    index = host.store.index
    assert [spot is not None for spot in index.find(host_space(host), CHAIN)] == [True] * 2 + [False] * 10


def test_a_handoffs_prompt_is_the_head_of_what_its_request_keeps(host: Host) -> None:
    """The decode engine keeps the answer; the prompt came by the handoff."""
    host.prefill()
    assert host.ask() == "granted"
    host.let_go(ok=True)
    answer = CHAIN[:4]
    for n in range(0, 4, 2):
        lot = b"lot%d" % n
        keep_of(host, "d", answer[n : n + 2], lot)
    quiet(host)
    index, space = host.store.index, host_space(host)
    order = list(host.store.policy.victims())
    places = [order.index(spot[0]) for spot in index.find(space, [*HASHES, *answer]) if spot is not None]
    assert len(places) == 7 and places == sorted(places, reverse=True)


def keep_of(host: Host, request: str, hashes: list[bytes], called: bytes) -> None:
    host.handoffs.keep(engine("D"), Keep(request_id=request, handoff_id=called, block_hashes=hashes), host.now)
    opened = host.heard["D"].pop()
    assert isinstance(opened, SendOpened)
    for place in filter(None, opened.places):
        host.store.arena.set_watermark(place.header_offset, PAGES.layers)
    host.handoffs.let_go("D", LetGo(handoff_id=called, side="send", fence=1, ok=True), host.now)
    host.tick()


def test_a_long_answer_is_not_gone_through_for_every_block() -> None:
    tier = CountingTier(cap_bytes=1 << 20)
    host = Host(extents=10, tier=tier)
    in_lots(host, [b"%d" % n for n in range(100)], blocks=1, request="chat")
    assert tier.names < 100 * 10
    tier.close(drain_s=0.0)


def test_what_is_done_with_chains_at_once_is_bounded(
    host: Host, narrow: CountingTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody waits for the control thread meanwhile."""
    monkeypatch.setattr(chains, "BLOCKS_A_TURN", 5, raising=False)
    for n in range(3):
        keep_filled(host, [b"%d/%d" % (n, m) for m in range(5)], b"lot", request=f"r{n}")
    names = narrow.names
    host.handoffs.engine_gone("P", host.now)
    assert narrow.names == names
    counted = []
    for _ in range(5):
        before = narrow.names
        host.tick()
        counted.append(narrow.names - before)
    assert counted == [5, 5, 5, 0, 0]


def test_a_chain_that_counts_in_parts_goes_from_its_end(
    host: Host, narrow: CountingTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "BLOCKS_A_TURN", 5, raising=False)
    keep_filled(host, CHAIN)
    assert len(look_up(host, CHAIN)) == 12
    names = narrow.names
    host.handoffs.let_go("P", LetGo(handoff_id=MINE, side="load", fence=1, ok=True), host.now)
    assert narrow.names == names
    for _ in range(3):
        host.tick()
    assert narrow.names >= names + 12
    others(host, 12, b"x")
    assert below(host, narrow) == [True] * 8 + [False] * 4


def test_of_a_tier_that_has_nothing_nothing_is_used(host: Host, narrow: CountingTier) -> None:
    narrow.paused = True
    keep_filled(host, CHAIN)
    look_up(host, CHAIN)
    let_go(host, side="load")
    assert narrow.names == 0


def test_who_stands_in_line_is_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "BLOCKS_A_TURN", 0)
    monkeypatch.setattr(chains, "SLOTS_IN_LINE_MAX", 10)
    for _ in range(20):
        keep_filled(host, CHAIN[:4])
    waiting = host.handoffs._chains
    assert waiting._slots_in_line == sum(len(use.slots) for use in waiting._line) < 10 + 4
    monkeypatch.setattr(chains, "BLOCKS_A_TURN", 20)
    quiet(host)
    assert (waiting._slots_in_line, len(waiting._line)) == (0, 0)


def test_a_chain_waits_for_its_last_lot_to_be_below(host: Host, narrow: CountingTier) -> None:
    in_lots(host, CHAIN[:10], blocks=1, request="chat")
    narrow.paused = True
    keep_filled(host, CHAIN[10:11], b"last", request="chat")
    names = narrow.names
    quiet(host)
    assert narrow.names == names
    narrow.paused = False
    host.tick()
    quiet(host)
    assert narrow.names == names + 11
    quiet(host)
    assert narrow.names == names + 11, "once"


def test_who_keeps_nothing_has_no_chain(host: Host) -> None:
    for _ in range(2):
        keep_filled(host, [], MINE, request="nothing")
    assert not host.handoffs._chains._chains
    in_lots(host, CHAIN, blocks=4, request="nothing")
    assert len(look_up(host, CHAIN)) == 12


def test_chains_are_forgotten(host: Host) -> None:
    known = host.handoffs._chains
    for n in range(20):
        keep_filled(host, [b"%d" % n], MINE, request=f"r{n}")
    assert len(known._chains) == 20
    host.handoffs.engine_gone("P", host.now)
    assert (len(known._chains), len(known._grown), known._blocks) == (0, 0, 0)


def test_the_oldest_chains_are_forgotten_for_new_ones(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdx.daemon.chains.CHAINS_MAX", 3)
    for n in range(20):
        keep_filled(host, [b"%d" % n], MINE, request=f"r{n}")
    assert [name[1] for name in host.handoffs._chains._chains] == ["r17", "r18", "r19"]
