"""Look-ups of an engine that computes faster than blocks come: they are skipped, counted, and tried again."""

from __future__ import annotations

from collections import Counter

import pytest
from one_host import HASHES, PAGES, Host, engine
from test_prefixes import MINE, OTHER, heard, leases, let_go
from test_tiering import crowd_out, keep_filled

from pdx.buffer.lease import Lease, Owner
from pdx.daemon.costs import Costs
from pdx.daemon.grips import Grip
from pdx.layout import PageLayout, Place
from pdx.tiers.cost import TRIED_EVERY
from pdx.tiers.memory import MemoryTier
from pdx.tiers.tier import Event
from pdx.verbs import Lookup
from pdx.wire import LetGo, LoadOpened, LookUp

BLOCK_TOKENS = engine("P").info.layout.block_tokens
FAST = 3 * BLOCK_TOKENS / 0.5  # tokens a second: three blocks in half a second
SLOW = 3 * BLOCK_TOKENS / 50.0


class Stalling(MemoryTier):
    """Does nothing while it is stalled; the test moves the clock meanwhile."""

    stalled = False

    def take_events(self) -> list[Event]:
        return [] if self.stalled else super().take_events()


@pytest.fixture
def kind_of_tier() -> type[Stalling]:
    return Stalling


@pytest.fixture
def host(tier: Stalling) -> Host:
    return Host(tier=tier)


def look_up(host: Host, tokens_per_s: float, hashes: list[bytes] = HASHES, called: bytes = MINE) -> list[Place]:
    message = LookUp(request_id="r", handoff_id=called, block_hashes=hashes, tokens_per_s=tokens_per_s)
    host.handoffs.look_up(engine("P"), message, host.now)
    answer = heard(host)
    assert isinstance(answer, LoadOpened)
    return answer.places


def skipped(host: Host) -> tuple[int, int, int]:
    return tuple(host.counters[f"loads_{what}"] for what in ("skipped_arena", "skipped_disk", "tried"))  # type: ignore[return-value]


def read_from_disk(host: Host, tier: Stalling, seconds: float, tokens_per_s: float = 0.0) -> None:
    """The three blocks, in so many seconds; then they leave the arena again."""
    tier.stalled = True
    assert len(look_up(host, tokens_per_s)) == 3
    host.tick(seconds)
    tier.stalled = False
    host.tick()
    let_go(host, side="load")
    crowd_out(host)


@pytest.fixture
def slow_disk(host: Host, tier: Stalling) -> Host:
    """Three blocks a second, and they are on it only."""
    keep_filled(host)
    crowd_out(host)
    read_from_disk(host, tier, 1.0)
    return host


def load_from_arena(host: Host, *, seconds: float, tokens_per_s: float = 0.0, blocks: int = 3) -> None:
    assert len(look_up(host, tokens_per_s, HASHES[:blocks])) == blocks
    let_go(host, side="load", pages=blocks * PAGES.layers, seconds=seconds)


def test_a_fast_engine_skips_a_slow_disk_until_a_load_that_was_tried_is_quick(slow_disk: Host, tier: Stalling) -> None:
    host = slow_disk
    for _ in range(TRIED_EVERY - 1):
        assert look_up(host, FAST) == []
    assert skipped(host) == (0, TRIED_EVERY - 1, 0)
    assert leases(host) == 0 and tier.stats().open_reads == 0, "nothing was begun"
    host.now += 600.0  # idle: of no account, but what was measured before counts little
    read_from_disk(host, tier, 0.01, FAST)
    assert skipped(host) == (0, TRIED_EVERY - 1, 1)
    for _ in range(TRIED_EVERY):
        read_from_disk(host, tier, 0.01, FAST)
    assert skipped(host) == (0, TRIED_EVERY - 1, 1)


@pytest.mark.parametrize("tokens_per_s", [SLOW, 0.0])
def test_a_slow_engine_loads_and_one_that_has_not_measured_too(
    slow_disk: Host, tier: Stalling, tokens_per_s: float
) -> None:
    for _ in range(TRIED_EVERY):
        read_from_disk(slow_disk, tier, 1.0, tokens_per_s)
    assert skipped(slow_disk) == (0, 0, 0)


def test_two_engines_of_two_paces_share_what_the_disk_has_shown(slow_disk: Host) -> None:
    assert look_up(slow_disk, FAST) == []
    assert len(look_up(slow_disk, SLOW)) == 3


def test_until_the_disk_was_measured_everything_is_loaded(host: Host, tier: Stalling) -> None:
    keep_filled(host)
    crowd_out(host)
    tier.stalled = True
    for n in range(3):
        assert len(look_up(host, 1e12, called=bytes([n]) * 16)) == 3
        host.tick(10.0)
    assert skipped(host) == (0, 0, 0)


def test_reads_wait_behind_those_before_them(host: Host, tier: Stalling) -> None:
    """Alone the three blocks come sooner than they are computed; behind twelve others they do not."""
    others = [b"other %d" % n for n in range(12)]
    keep_filled(host)
    keep_filled(host, others, called=OTHER)
    crowd_out(host)
    read_from_disk(host, tier, 0.3)
    tier.stalled = True
    assert len(look_up(host, 0.0, others, OTHER)) == 12
    assert look_up(host, FAST) == []
    assert len(look_up(host, FAST / 4)) == 3, "in two seconds, against one and a half"
    let_go(host, side="load", ok=False)
    assert len(look_up(host, FAST, others[:3])) == 0
    tier.stalled = False
    host.tick()
    assert skipped(host) == (0, 2, 0)


def test_waiting_behind_others_is_not_the_disks_slowness(host: Host, tier: Stalling) -> None:
    """Six blocks in one second, in two looks at the clock: six a second, not three."""
    keep_filled(host)
    keep_filled(host, [b"a", b"b", b"c"], called=OTHER)
    crowd_out(host)
    tier.stalled = True
    look_up(host, 0.0)
    look_up(host, 0.0, [b"a", b"b", b"c"], OTHER)
    host.tick(1.0)
    tier.stalled = False
    host.tick()
    assert host.handoffs.kept(host.now)["costs"]["disk_bytes_per_s"] == pytest.approx(6 * PAGES.block_bytes)


def test_memory_is_loaded_where_the_disk_below_it_is_skipped(slow_disk: Host) -> None:
    host = slow_disk
    keep_filled(host, HASHES[:1])
    assert len(look_up(host, FAST)) == 1
    assert skipped(host) == (0, 1, 0)


def test_memory_above_a_gap_need_not_be_read(slow_disk: Host) -> None:
    """One block from the disk opens the way to two that are in the arena behind it: a third of a second for three."""
    host = slow_disk
    keep_filled(host, HASHES[1:])
    assert len(look_up(host, FAST)) == 3


def test_an_engine_that_copies_slowly_skips_the_arena_and_others_do_not(host: Host) -> None:
    keep_filled(host)
    load_from_arena(host, seconds=1.0)
    for _ in range(TRIED_EVERY - 1):
        assert look_up(host, FAST) == []
    assert skipped(host) == (TRIED_EVERY - 1, 0, 0)
    message = LookUp(request_id="r", handoff_id=OTHER, block_hashes=HASHES, tokens_per_s=FAST)
    host.handoffs.look_up(engine("D"), message, host.now)
    (answer,) = host.answers()
    assert answer.status == "granted"
    host.now += 600.0
    load_from_arena(host, seconds=0.01, tokens_per_s=FAST)
    assert skipped(host) == (TRIED_EVERY - 1, 0, 1)
    load_from_arena(host, seconds=0.01, tokens_per_s=FAST)
    host.handoffs.engine_gone("P", host.now)
    assert "P" not in host.handoffs.kept(host.now)["costs"]["arena_bytes_per_s"]


@pytest.mark.parametrize("about", [{"ok": False, "seconds": 9.0}, {"seconds": 0.0}])
def test_loads_that_failed_or_were_not_measured_say_nothing(host: Host, about: dict[str, float]) -> None:
    keep_filled(host)
    look_up(host, FAST)
    let_go(host, side="load", pages=6, **about)  # type: ignore[arg-type]
    assert len(look_up(host, FAST)) == 3


def test_a_load_that_waited_for_the_disk_says_nothing_of_the_arena(host: Host) -> None:
    keep_filled(host)
    crowd_out(host)
    look_up(host, 0.0)
    host.tick()
    let_go(host, side="load", pages=6, seconds=9.0)
    assert len(look_up(host, FAST)) == 3
    assert skipped(host) == (0, 0, 0)


@pytest.mark.parametrize(("shards", "pages"), [(2, 2), (1, 4)])
def test_ranks_that_copy_beside_each_other_are_as_fast_as_one_of_all(shards: int, pages: int) -> None:
    """A block of two layers in half a second: each of two ranks its own half, or each the whole."""
    layout = PageLayout(layers=2, page_bytes=64, chunk_blocks=2, shards=shards)
    costs = Costs(Counter(), None)
    grip = Grip(MINE, "load", "P", Lease(1, Owner("session", "P"), (), 0.0), ranks=2)
    costs.ended(grip, LetGo(handoff_id=MINE, side="load", fence=1, ok=True, pages=pages, seconds=0.5), layout, 0.0)
    assert costs.stats()["arena_bytes_per_s"] == {"P": 2 * layout.block_bytes}


def test_the_verb_tells_what_is_there_whatever_it_costs(slow_disk: Host) -> None:
    from test_tiering import host_space

    space = host_space(slow_disk)
    assert look_up(slow_disk, FAST) == []
    slow_disk.handoffs.spaces.met(engine("P"))
    found = slow_disk.handoffs.steer(Lookup(space=space, block_hashes=HASHES), slow_disk.now)
    assert getattr(found, "blocks", 0) == getattr(found, "disk_blocks", 0) == 3
