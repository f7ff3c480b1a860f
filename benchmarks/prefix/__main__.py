"""What a kept prefix is worth: hits, documents, a chat, restarts, and what saving costs where nothing is asked again.

One engine with a pdxd and its disk, against the same engine without, one whose own cache holds everything, and
LMCache's multi-process mode at whichever of its transports is best here. The full run takes two hours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.arms import Scratch, pdx_pair
from benchmarks.harness.measure import pin_client
from benchmarks.harness.report import Report, options
from benchmarks.model import build
from benchmarks.prefix import chat, documents, hits, restart, shared, zero
from benchmarks.prefix.engines import CachingArm, pdx, plain
from benchmarks.prefix.lmcache import TRANSPORTS, lmcache

ARENA, ARENA_GIB = "1536MiB", 1.5
OURS, PEER = "pdx", "LMCache"
FILE_SYSTEM = Path(__file__).resolve().parents[2] / ".cache"  # for the disk tier: a temporary folder may be memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench prefix", description=__doc__.partition("\n")[0])
    options(parser)
    parser.add_argument("--only", choices=list(PARTS), help="one section (default: all)")
    parser.add_argument("--no-lmcache", action="store_true", help="leave the peer out")
    parser.add_argument("--transport", choices=list(TRANSPORTS), help="LMCache's (default: the fastest is found first)")
    chosen = parser.parse_args()
    pin_client()
    report = Report("prefix")
    model = chosen.model or build()
    for name in [chosen.only] if chosen.only else PARTS:
        with tempfile.TemporaryDirectory(prefix="bench-disk-", dir=FILE_SYSTEM) as disk, Scratch(model) as scratch:
            chosen.disk = Path(disk)
            PARTS[name](scratch, report, chosen)
            for arm in scratch.arms:
                report.arm(arm)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


def _hits(scratch: Scratch, report: Report, chosen: argparse.Namespace) -> None:
    fio_rate = hits.fio(FILE_SYSTEM)
    peers = _peers(scratch, report, chosen)
    ours = pdx(scratch, OURS, arena=ARENA, disk=chosen.disk)
    taken = hits.measure([ours, *peers], 2 if chosen.quick else 6, report)
    hits.judge(taken, report, ours=OURS, peers=[arm.name for arm in peers], fio_rate=fio_rate)


def _documents(scratch: Scratch, report: Report, chosen: argparse.Namespace) -> None:
    library = documents.QUICK_LIBRARY if chosen.quick else documents.LIBRARY
    small, gib = library.small_flags, library.below_gib
    ours = pdx(scratch, OURS, arena=f"{round(gib * 1024)}MiB", flags=small)
    cases = documents.QUICK if chosen.quick else documents.FULL
    questions = documents.Questions(library, cases, report, file=chosen.json)
    with Scratch(scratch.model) as early:  # arms that end when they have been measured, for the room that they take
        ceiling = plain(early, documents.UNLIMITED, library.unlimited_flags)
        questions.read(ours, ceiling)
        questions.beside_ceiling(ours, ceiling)
    with Scratch(scratch.model) as early:
        for peer in _peers(early, report, chosen, memory_gib=library.peer_gib, flags=small):
            questions.read(peer)
            questions.beside_peer(ours, peer)
    questions.beside_small(ours, plain(scratch, documents.SMALL, small))
    questions.show()


def _shared(scratch: Scratch, report: Report, chosen: argparse.Namespace) -> None:
    peers = _peers(scratch, report, chosen)
    arms = [plain(scratch, zero.BASE), pdx(scratch, OURS, arena=ARENA), *peers]
    shared.measure(arms, 2 if chosen.quick else 6, report)


def _zero(scratch: Scratch, report: Report, chosen: argparse.Namespace) -> None:
    arms = [plain(scratch, zero.BASE), pdx(scratch, OURS, arena=ARENA), *_peers(scratch, report, chosen)]
    zero.measure([*arms, plain(scratch, zero.CONTROL)], 3 if chosen.quick else 24, report)


def _chat(scratch: Scratch, report: Report, chosen: argparse.Namespace) -> None:
    chat.measure([pdx_pair(scratch, name, daemons=daemons) for name, daemons in CHATS.items()], report)


def _restart(scratch: Scratch, report: Report, chosen: argparse.Namespace) -> None:
    restart.measure(scratch, chosen.disk, report)


def _peers(
    scratch: Scratch,
    report: Report,
    chosen: argparse.Namespace,
    *,
    memory_gib: float = ARENA_GIB,
    flags: Sequence[str] = (),
) -> list[CachingArm]:
    """LMCache's arm, or none if it is not wanted. Its transport is found once, by the time that a long hit takes."""
    if chosen.no_lmcache:
        return []
    if chosen.transport is None:
        with Scratch(scratch.model) as trial:
            arms = [
                lmcache(trial, name, transport=name, memory_gib=ARENA_GIB, block_tokens=hits.BLOCK_TOKENS)
                for name in TRANSPORTS
            ]
            taken = hits.measure(arms, 2, report)
        costs = {name: round(each.memory_s(hits.SIZES[-1]) * 1e3, 1) for name, each in taken.items()}
        chosen.transport = min(costs, key=lambda name: costs[name])
        report.figures["LMCache, a hit of 3,500 tokens by transport, ms"] = costs
        report.progress(f"LMCache's best transport here is {chosen.transport}: {costs}")
    name = f"{PEER} ({chosen.transport})"
    return [
        lmcache(
            scratch, name, transport=chosen.transport, memory_gib=memory_gib, block_tokens=hits.BLOCK_TOKENS,
            flags=flags,
        )
    ]  # fmt: skip


CHATS = {"two hosts": ("a", "b"), "one host": ("a", "a")}
Part = Callable[[Scratch, Report, argparse.Namespace], None]
PARTS: dict[str, Part] = {
    "hits": _hits, "documents": _documents, "shared": _shared, "zero": _zero, "chat": _chat, "restart": _restart,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
