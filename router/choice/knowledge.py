"""What the router knows of the blocks that daemons keep, and what of that a prompt would find where.

Two sources. Daemons say what they keep (HOLDINGS), in messages that are numbered: after a gap nothing of that daemon
counts until it has told all anew. And what this router has sent somewhere to be computed is *expected* there: for
some seconds, until the daemon has had the time to say so, since requests that come in one burst would else all go where
their prefix is not. Both are hints: an engine asks its daemon itself.

Names are the tenant's own (`keys.short_names`), so a prompt finds only what the same tenant's requests have left.
One thread. Time is an argument.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pdx.router.choice.holders import Held, Holders
from pdx.wire import ARENA_BIT, DISK_BIT, DaemonRef, Holdings

NAMES_MAX = 1 << 25  # 32 daemons with a million blocks each, none shared; about a GB then, and nothing before
DAEMONS_MAX = 4096
EXPECTED_S = 10.0  # a long prompt is computed in seconds; what was wrong costs one wrong choice
NOBODY_UNTIL = ("", 0.0)
EXPECTED_MAX = 1 << 17  # names: a thousand prompts of two thousand tokens


class Found(msgspec.Struct, frozen=True):
    """What a daemon has of a prompt: leading blocks."""

    blocks: int = 0  # in any tier, or expected
    arena_blocks: int = 0  # of these, before the first that is only on the disk
    kept_blocks: int = 0  # of these, before the first that is only expected


@dataclass(slots=True)
class _Daemon:
    incarnation: int
    holder: int
    number: int = 0  # of the next message


class Knowledge:
    """Owned by the event loop's thread."""

    def __init__(self, *, names_max: int = NAMES_MAX) -> None:
        self._holders = Holders(names_max=names_max)
        self._daemons: dict[str, _Daemon] = {}
        self._expected: OrderedDict[int, tuple[str, float]] = OrderedDict()  # name -> daemon, until when
        self.forgotten = 0  # blocks for which there was no room
        self.generation = 0  # grows with all that may make `found` say something else, but for time

    def __len__(self) -> int:
        """Blocks that some daemon is known to have."""
        return len(self._holders)

    def __repr__(self) -> str:
        return f"<Knowledge {self._holders}, {len(self._daemons)} daemons, {len(self._expected)} expected>"

    def on_holdings(self, message: Holdings) -> bool:
        """False: something before it was missed, and it is of no use. The daemon is to tell all anew."""
        if message.number == 0:
            self._forget_daemon(message.daemon_id)
            self._add(message.daemon_id, message.incarnation)
        daemon = self._daemons.get(message.daemon_id)
        if daemon is None or (daemon.incarnation, daemon.number) != (message.incarnation, message.number):
            self._forget_daemon(message.daemon_id)
            return False
        daemon.number += 1
        self.generation += 1
        count = min(len(message.names) // 8, len(message.tiers))
        for name, tiers in zip(struct.unpack_from(f">{count}Q", message.names), message.tiers, strict=False):
            arena, disk = bool(tiers & ARENA_BIT), bool(tiers & DISK_BIT)
            self.forgotten += not self._holders.put(name, daemon.holder, arena=arena, disk=disk)
        return True

    def on_announce(self, ref: DaemonRef, holdings: int) -> bool:
        """`holdings`: how many messages that daemon has sent. False: some were missed; it is to tell all anew."""
        daemon = self._daemons.get(ref.daemon_id)
        if daemon is not None and (daemon.incarnation, daemon.number) == (ref.incarnation, holdings):
            return True
        self._forget_daemon(ref.daemon_id)
        return holdings == 0

    def gone(self, daemon_id: str) -> None:
        """It has left, or has been silent for too long."""
        self._forget_daemon(daemon_id)

    def expect(self, names: Sequence[int], daemon: DaemonRef, now: float) -> None:
        """These blocks are about to be computed there; it is alive."""
        self.generation += 1
        if daemon.daemon_id not in self._daemons:
            self._add(daemon.daemon_id, daemon.incarnation)
        for name in names:
            self._expected[name] = daemon.daemon_id, now + EXPECTED_S
            self._expected.move_to_end(name)
        while self._expected and (len(self._expected) > EXPECTED_MAX or next(iter(self._expected.values()))[1] <= now):
            self._expected.popitem(last=False)

    def found(self, names: Sequence[int], now: float) -> dict[str, Found]:
        """What each daemon has of this prompt; those that have nothing are left out."""
        bits = {daemon_id: 1 << daemon.holder for daemon_id, daemon in self._daemons.items()}
        everybody = sum(bits.values())
        whole, arena, kept = _Leading(everybody), _Leading(everybody), _Leading(everybody)
        before: tuple[Held | None, str] = None, ""
        for block, (name, held) in enumerate(zip(names, self._holders.of(names), strict=True)):
            daemon_id, until = self._expected.get(name, NOBODY_UNTIL)
            if until <= now:
                daemon_id = ""
            if held is before[0] and daemon_id == before[1]:
                continue  # as most blocks: whoever has had all up to the one before it has this one too
            before = held, daemon_id
            expected = bits.get(daemon_id, 0)
            kept.at(block, held.arena)
            arena.at(block, held.arena | expected)
            if not whole.at(block, held.arena | held.disk | expected):
                break
        counts = {
            daemon_id: Found(*(each.blocks(bit, of=len(names)) for each in (whole, arena, kept)))
            for daemon_id, bit in bits.items()
        }
        return {daemon_id: found for daemon_id, found in counts.items() if found.blocks}

    def check_integrity(self) -> None:
        self._holders.check_integrity()

    def _add(self, daemon_id: str, incarnation: int) -> None:
        if len(self._daemons) >= DAEMONS_MAX:
            self._forget_daemon(next(iter(self._daemons)))  # the oldest; a live one is to tell all anew
        self._daemons[daemon_id] = _Daemon(incarnation, self._free_holder())

    def _forget_daemon(self, daemon_id: str) -> None:
        daemon = self._daemons.pop(daemon_id, None)
        self.generation += 1
        if daemon is not None:
            self._holders.leave(daemon.holder)

    def _free_holder(self) -> int:
        taken = {daemon.holder for daemon in self._daemons.values()}
        return next(holder for holder in range(len(taken) + 1) if holder not in taken)


class _Leading:
    """Who has had every block so far."""

    __slots__ = ("_ends", "_still")

    def __init__(self, everybody: int) -> None:
        self._still = everybody
        self._ends: list[tuple[int, int]] = []  # holders, and the first block that they have not

    def at(self, block: int, holders: int) -> int:
        """Those who are left when these have this one."""
        still = self._still & holders
        if still != self._still:
            self._ends.append((self._still ^ still, block))
            self._still = still
        return still

    def blocks(self, holder: int, *, of: int) -> int:
        return next((block for holders, block in self._ends if holders & holder), of)
