"""What every tier must do, as functions anybody can call: check_all(make_tier), or one check_<property> at a time.

`make_tier(cap_bytes)` is a context manager that yields a fresh, empty tier which holds at least some and at most
`cap_bytes` bytes, and leaves nothing behind. A check raises AssertionError naming what was broken. Nothing here sleeps:
every wait is for an event, under a deadline.
"""

from __future__ import annotations

import itertools
import mmap
import random
import select
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from pdx.buffer.selection import Selection
from pdx.errors import ClosedTier
from pdx.keys import SPACE_BYTES
from pdx.tiers.sweep import Sweeper
from pdx.tiers.tier import META_BYTES_MAX, End, Failed, Key, Loaded, Missed, Read, StateChanged, Tier, Write, Written

WAIT_S = 20.0
PAGE_BYTES = 16 << 10
PAGES = 6
BLOCK_BYTES = PAGES * PAGE_BYTES
ROOMY_BYTES = 32 << 20
NARROW_BYTES = 6 << 20  # some dozens of blocks, whatever a tier spends on top
ASKED_MAX = 10_000  # far more requests than any tier keeps open

MakeTier = Callable[[int], AbstractContextManager[Tier]]


class User:
    """Somebody who uses a tier, remembers every end and finds a second one wrong."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.ends: dict[int, End] = {}
        self._open: dict[int, object] = {}  # keeps the buffers of open requests alive

    def ask(self, request: Write | Read) -> int:
        """Submits, waiting for room if need be."""
        deadline = time.monotonic() + WAIT_S
        while (ticket := self.tier.submit(request)) is None:
            assert time.monotonic() < deadline, "the tier takes no request, and ends none"
            self.pump(deadline)
        self._open[ticket] = request
        return ticket

    def pump(self, deadline: float) -> None:
        """Waits for the descriptor, then takes what there is."""
        select.select([self.tier.fileno()], [], [], max(0.0, deadline - time.monotonic()))
        for event in self.tier.take_events():
            if isinstance(event, StateChanged):
                continue
            assert event.ticket not in self.ends, f"{event} is a second end, after {self.ends[event.ticket]}"
            self._open.pop(event.ticket, None)
            self.ends[event.ticket] = event

    def end_of(self, ticket: int) -> End:
        deadline = time.monotonic() + WAIT_S
        while ticket not in self.ends:
            assert time.monotonic() < deadline, f"ticket {ticket} has not ended after {WAIT_S:g} s"
            self.pump(deadline)
        return self.ends[ticket]

    def write(self, key: Key, *, pages: Sequence[memoryview] | None = None, meta: bytes = b"") -> End:
        return self.end_of(self.ask(Write(key, block(key) if pages is None else pages, meta)))

    def read(self, key: Key) -> tuple[End, bytes]:
        """The end, and what the buffers then hold."""
        pages = buffers()
        end = self.end_of(self.ask(Read(key, pages)))
        return end, b"".join(pages)


def key_of(number: int) -> Key:
    return b"namespace", number.to_bytes(8, "little") * 4


def payload_of(key: Key) -> bytes:
    return random.Random(key[1]).randbytes(BLOCK_BYTES)  # noqa: S311 - seeded on purpose


def buffers() -> list[memoryview]:
    """Aligned pages of one block, apart from each other as in a slot."""
    memory = memoryview(mmap.mmap(-1, 2 * BLOCK_BYTES))
    return [memory[start : start + PAGE_BYTES] for start in range(0, 2 * BLOCK_BYTES, 2 * PAGE_BYTES)]


def block(key: Key) -> list[memoryview]:
    payload = memoryview(payload_of(key))
    pages = buffers()
    for index, page in enumerate(pages):
        page[:] = payload[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
    return pages


def check_all(make_tier: MakeTier) -> None:
    for check in CHECKS:
        check(make_tier)


def check_written_is_loaded(make_tier: MakeTier) -> None:
    """Pages and meta come back as they were, as often as they are asked for."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        metas = [b"", b"m", bytes(range(256)) * 20, bytes(META_BYTES_MAX)]
        for number, meta in enumerate(metas):
            assert isinstance(user.write(key_of(number), meta=meta), Written), "a write failed"
        for number, meta in list(enumerate(metas)) * 2:
            end, payload = user.read(key_of(number))
            assert isinstance(end, Loaded), f"a block just written is not loaded: {end}"
            assert payload == payload_of(key_of(number)), "other bytes came back than were written"
            assert end.meta == meta, "another meta came back than was written"


def check_any_buffers(make_tier: MakeTier) -> None:
    """Buffers of odd lengths at odd addresses, thousands of them, and cut otherwise for reading than for writing."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        rng = random.Random(5)  # noqa: S311 - seeded on purpose
        for number, length in enumerate((1, 511, 4096, 4097, 100_001)):
            payload = rng.randbytes(length)
            cuts = sorted({0, length, *(rng.randrange(length) for _ in range(min(length, 1500)))})
            source = memoryview(bytearray(b"x" + payload))[1:]
            written = [source[start:stop] for start, stop in itertools.pairwise(cuts)]
            assert isinstance(user.write(key_of(number), pages=written), Written), f"{length} bytes were not written"
            whole = memoryview(bytearray(length + 3))[3:]
            halves = [half for half in (whole[: length // 2], whole[length // 2 :]) if half.nbytes]
            end = user.end_of(user.ask(Read(key_of(number), halves)))
            assert isinstance(end, Loaded), f"{length} bytes were not loaded: {end}"
            assert whole == payload, f"{length} bytes came back wrong"


def check_unknown_is_missed(make_tier: MakeTier) -> None:
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        user.write(key_of(1))
        others = [(b"other", key_of(1)[1]), (b"", b"namespace" + key_of(1)[1]), key_of(2)]
        assert tier.contains([key_of(1), *others]) == [True, False, False, False], "contains is wrong"
        for key in others:
            end, _ = user.read(key)
            assert isinstance(end, Missed), f"a block never written was found: {end}"


def check_found_when_written_ends(make_tier: MakeTier) -> None:
    """contains says yes from a write's end on, and a second write of the block changes nothing."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        assert tier.contains([key_of(1)]) == [False], "an empty tier contains a block"
        user.write(key_of(1))
        assert tier.contains([key_of(1)]) == [True], "a written block is not contained"
        used_bytes = tier.stats().used_bytes
        assert isinstance(user.write(key_of(1)), Written), "a block that is there can't be written again"
        assert tier.stats().used_bytes == used_bytes, "a block takes room twice"
        assert tier.stats().blocks == 1, "a block is counted twice"


def check_other_length_is_missed(make_tier: MakeTier) -> None:
    """Buffers that don't fit the block are a miss, not a part of it."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        for number, pages in ((1, buffers()[1:]), (2, buffers() + buffers()[:1])):
            user.write(key_of(number))
            end = user.end_of(user.ask(Read(key_of(number), pages)))
            assert isinstance(end, Missed), f"a block was loaded into buffers of another length: {end}"


def check_removed_is_missed(make_tier: MakeTier) -> None:
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        user.write(key_of(1))
        user.write(key_of(2))
        tier.remove(key_of(1))
        assert tier.contains([key_of(1), key_of(2)]) == [False, True], "contains is wrong after remove"
        assert isinstance(user.read(key_of(1))[0], Missed), "a removed block was found"
        tier.remove(key_of(1))
        tier.remove(key_of(3))
        assert isinstance(user.read(key_of(2))[0], Loaded), "another block was removed too"


def check_many_open(make_tier: MakeTier) -> None:
    """Requests in any order and number: each ends once, and no byte goes astray."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        rng = random.Random(6)  # noqa: S311 - seeded on purpose
        for number in range(12):
            user.write(key_of(number))
        reads = {}
        for _ in range(150):
            number, pages = rng.randrange(16), buffers()
            reads[user.ask(Read(key_of(number), pages))] = number, pages
            if rng.random() < 0.2:
                user.ask(Write(key_of(number), block(key_of(number))))
            if rng.random() < 0.1:
                tier.remove(key_of(rng.randrange(16)))
        for ticket, (number, pages) in reads.items():
            end = user.end_of(ticket)
            assert isinstance(end, Loaded | Missed), f"a read ended in {end}"
            if isinstance(end, Loaded):
                assert b"".join(pages) == payload_of(key_of(number)), "a block came back wrong"


def check_refuses_when_full(make_tier: MakeTier) -> None:
    """Too many open requests are answered with None at once; there is room again when some have ended."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        user.write(key_of(1))
        open_tickets: list[int] = []
        pages = buffers()
        for _ in range(ASKED_MAX):
            ticket = tier.submit(Read(key_of(1), pages))
            if ticket is None:
                break
            open_tickets.append(ticket)
        else:
            raise AssertionError(f"{ASKED_MAX} requests were taken: the queue has no bound")
        assert tier.stats().refused >= 1, "a refusal was not counted"
        for ticket in open_tickets:
            user.end_of(ticket)
        assert isinstance(user.read(key_of(1))[0], Loaded), "no request is taken after a refusal"


def check_cap(make_tier: MakeTier) -> None:
    """However much is written, the cap holds; what was written last is there, what was never used is gone."""
    with make_tier(NARROW_BYTES) as tier:
        user = User(tier)
        count = 2 * NARROW_BYTES // BLOCK_BYTES
        for number in range(count):
            assert isinstance(user.write(key_of(number)), Written), "a write failed although others could go"
            stats = tier.stats()
            assert stats.used_bytes <= stats.cap_bytes <= NARROW_BYTES, f"{stats.used_bytes} bytes exceed the cap"
        found = tier.contains([key_of(number) for number in range(count)])
        assert found[-1], "the block written last is gone"
        assert not all(found), "more is there than fits"
        assert sum(found) == tier.stats().blocks, "blocks are counted wrong"
        assert tier.stats().evicted == count - sum(found), "evictions are counted wrong"
        for number, is_there in enumerate(found):
            assert isinstance(user.read(key_of(number))[0], Loaded) == is_there, "contains and Read disagree"


def check_too_large_fails(make_tier: MakeTier) -> None:
    """A block larger than the tier fails, and nothing is evicted for it."""
    with make_tier(NARROW_BYTES) as tier:
        user = User(tier)
        user.write(key_of(1))
        huge = [memoryview(bytes(NARROW_BYTES + 1))]
        assert isinstance(user.write(key_of(2), pages=huge), Failed), "a block larger than the tier was taken"
        assert tier.contains([key_of(1), key_of(2)]) == [True, False], "a hopeless write changed what is there"


def check_nonsense_is_refused(make_tier: MakeTier) -> None:
    with make_tier(ROOMY_BYTES) as tier:
        bad = [
            Write((b"n" * 256, b"h"), buffers()),
            Write((b"n", b"h" * 256), buffers()),
            Write(key_of(1), buffers(), bytes(META_BYTES_MAX + 1)),
            Write(key_of(1), []),
        ]
        for request in bad:
            try:
                tier.submit(request)
            except ValueError:
                continue
            raise AssertionError(f"{request} was taken")
        assert tier.stats().blocks == 0, "nonsense was kept"


def check_cancel(make_tier: MakeTier) -> None:
    """Cancelled requests end like all others, once; a cancelled write leaves a whole block or none."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        user.write(key_of(0))
        writes = {number: user.ask(Write(key_of(number), block(key_of(number)))) for number in range(1, 20)}
        reads = [user.ask(Read(key_of(0), buffers())) for _ in range(20)]
        for ticket in [*writes.values(), *reads, 10**9]:
            tier.cancel(ticket)
        for number, ticket in writes.items():
            is_written = isinstance(user.end_of(ticket), Written)
            assert tier.contains([key_of(number)]) == [is_written], "a cancelled write left something behind"
        for ticket in reads:
            assert isinstance(user.end_of(ticket), Loaded | Failed), "a cancelled read is a miss"
        assert isinstance(user.read(key_of(0))[0], Loaded), "cancelling reads lost a block"
        assert isinstance(user.write(key_of(1)), Written), "a cancelled block can't be written any more"


def check_swept_is_missed(make_tier: MakeTier) -> None:
    """For tiers that can be swept: exactly what is meant is found no more; the same can be written again."""
    with make_tier(ROOMY_BYTES) as tier:
        if not isinstance(tier, Sweeper):
            return
        user, spaces, tenants = User(tier), (b"s" * SPACE_BYTES, b"z" * SPACE_BYTES), (b"", b"t" * 16)
        keys = [(space + tenant, bytes([n]) * 32) for space in spaces for tenant in tenants for n in range(3)]
        for key in keys:
            assert isinstance(user.write(key), Written), "a write failed"
        selections = [
            Selection(spaces=frozenset(spaces[:1]), tenant=b"", block_hashes=frozenset({keys[0][1], b"unknown"})),
            Selection(older_s=1e6),
            Selection(spaces=frozenset(spaces[:1])),
            Selection(other_than=frozenset(spaces)),
            Selection(other_than=frozenset(spaces[:1]), tenant=tenants[0]),
            Selection(tenant=tenants[1]),
            Selection(),
        ]
        left = set(keys)
        for which in selections:
            taken = {key for key in left if which.takes(key, age_s=0.0)}
            surveyed = tier.survey(which)
            assert tier.contains(keys) == [key in left for key in keys], "a survey has taken something"
            done = tier.sweep(which)
            assert (surveyed.blocks, done.blocks) == (len(taken), len(taken)), "blocks are counted wrong"
            assert surveyed.size_bytes == done.size_bytes >= len(taken) * BLOCK_BYTES, "bytes are counted wrong"
            left -= taken
            assert tier.contains(keys) == [key in left for key in keys], "other blocks were taken than meant"
        deadline = time.monotonic() + WAIT_S
        while tier.survey(Selection()).leaving:
            assert time.monotonic() < deadline, "what was swept never leaves"
            user.pump(min(deadline, time.monotonic() + 0.1))
        assert isinstance(user.write(keys[0]), Written), "a swept block can't be written any more"


def check_closed_is_closed(make_tier: MakeTier) -> None:
    """Open requests end; no buffer is touched, nothing is taken and nothing raises afterwards."""
    with make_tier(ROOMY_BYTES) as tier:
        user = User(tier)
        user.write(key_of(1))
        pages = [buffers() for _ in range(30)]
        tickets = [user.ask(Read(key_of(1), each)) for each in pages]
        tier.close(drain_s=0.0)
        ended = {event.ticket for event in tier.take_events() if not isinstance(event, StateChanged)} | set(user.ends)
        assert ended >= set(tickets), "requests have not ended although the tier is closed"
        before = [b"".join(each) for each in pages]
        tier.close(drain_s=1.0)
        try:
            tier.submit(Read(key_of(1), buffers()))
        except ClosedTier:
            pass
        else:
            raise AssertionError("a closed tier took a request")
        tier.cancel(tickets[0])
        assert tier.take_events() == [], "a closed tier has more to say"
        assert [b"".join(each) for each in pages] == before, "a closed tier wrote into buffers"


CHECKS: tuple[Callable[[MakeTier], None], ...] = (
    check_written_is_loaded,
    check_any_buffers,
    check_unknown_is_missed,
    check_found_when_written_ends,
    check_other_length_is_missed,
    check_removed_is_missed,
    check_many_open,
    check_refuses_when_full,
    check_cap,
    check_too_large_fails,
    check_nonsense_is_refused,
    check_cancel,
    check_swept_is_missed,
    check_closed_is_closed,
)
