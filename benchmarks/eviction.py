"""Which eviction policy keeps more of what is asked for again: request traces, replayed through the real store.

A request is what an engine makes of it: a look-up of its leading blocks, and an offer of all. Hits are blocks found by
look-ups, as a share of those that had been there before: of the rest, nobody could keep any.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from benchmarks.harness.report import Report
from pdx.buffer.headers import Headers
from pdx.buffer.lease import Owner
from pdx.buffer.policies import POLICIES
from pdx.buffer.store import Store
from pdx.layout import CONTROL_BYTES, ExtentPlan, PageLayout

PAGES = PageLayout(layers=1, page_bytes=256, chunk_blocks=16)
EXTENT_BYTES = 1 << 20
EXTENTS = 8
ROOM = EXTENTS * ExtentPlan(PAGES, EXTENT_BYTES).units  # blocks
OWNER = Owner("session", "trace")
Trace = Iterator[list[bytes]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench eviction", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000, help="of each trace (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few requests: shows that it runs")
    parser.add_argument("--json", type=Path, help="where to write the result (default: benchmarks/history)")
    given = parser.parse_args(arguments)
    report = Report("eviction")
    for name, trace in TRACES.items():
        shares = {policy: hit_share(trace, policy, 400 if given.quick else given.requests) for policy in POLICIES}
        report.figures[name] = shares
        print(f"{name}: {', '.join(f'{policy} {share:.3f}' for policy, share in shares.items())}", flush=True)
    # What the default rests on: conversations, which most daemons keep, lose by S3-FIFO what scans and loops gain.
    for name, better, other in (("chats", "lru", "s3fifo"), ("shared prompts and scans", "s3fifo", "lru")):
        shares = report.figures[name]
        report.bar(
            f"{name}: {better} over {other}", shares[better], f"> {shares[other]}", shares[better] > shares[other]
        )
    report.write(given.json)
    return 0 if report.all_hold else 1


def hit_share(trace: Callable[[random.Random], Trace], policy: str, requests: int) -> float:
    memory = memoryview(bytearray(CONTROL_BYTES + EXTENTS * EXTENT_BYTES))
    store = Store(
        Headers(memory), extent_bytes=EXTENT_BYTES, handoff_share=0.9, policy=POLICIES[policy]()  # type: ignore[arg-type]
    )  # fmt: skip
    seen: set[bytes] = set()
    hits = possible = 0
    for hashes in (request for request, _ in zip(trace(random.Random(7)), range(requests), strict=False)):
        read = store.read(OWNER, b"", hashes, now=0.0, ttl_s=1.0)
        if read is not None:
            hits += len(read.places)
            store.release(read.lease)
        possible += sum(name in seen for name in hashes)
        seen.update(hashes)
        claim = store.claim(OWNER, b"", PAGES, hashes, tail=False, now=0.0, ttl_s=1.0)
        assert claim is not None, "nothing else is leased"
        store.commit(claim)
        store.release(claim.lease)
    store.check_integrity()
    return round(hits / possible, 3)


def shared_and_scans(rng: random.Random) -> Trace:
    """Twenty system prompts, some of them popular, and every eighth request a long document that nobody asks twice."""
    for number in count():
        if number % 8 == 7:
            yield chain(b"scan %d" % number, ROOM // 4)
        else:
            prompt = rng.choices(range(20), [1 / (rank + 1) for rank in range(20)])[0]
            yield chain(b"system %d" % prompt, ROOM // 24) + chain(b"question %d" % number, 8)


def chats(rng: random.Random) -> Trace:
    """Conversations that grow by 12 blocks a round and end after about ten; more of them at once than there is room."""
    rounds: dict[int, int] = {}
    names = count()
    while True:
        if len(rounds) < ROOM // 60:
            rounds[next(names)] = 0
        chat = rng.choice(list(rounds))
        rounds[chat] += 1
        yield chain(b"chat %d" % chat, 12 * rounds[chat])
        if rng.random() < 0.1 or rounds[chat] == 20:
            del rounds[chat]


def documents(rng: random.Random) -> Trace:
    """Questions about documents, any of them next, which take a third more than the arena has."""
    for number in count():
        yield chain(b"document %d" % rng.randrange(16), ROOM // 12) + chain(b"question %d" % number, 2)


def loop(rng: random.Random) -> Trace:
    """The same documents, one after the other, again and again."""
    for number in count():
        yield chain(b"document %d" % (number % 16), ROOM // 12) + chain(b"question %d" % number, 2)


def chain(stem: bytes, blocks: int) -> list[bytes]:
    return [b"%s/%d" % (stem, block) for block in range(blocks)]


TRACES = {
    "shared prompts and scans": shared_and_scans,
    "chats": chats,
    "documents": documents,
    "loop": loop,
}  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
