"""Tells routers which blocks this daemon keeps: names that come and go, by tier. Sans-IO: `send` and `now` are given.

A conversation with a router begins anew with all that there is, a part in each turn, and goes on with what changes. An
entry says in which tiers its block is when it is sent, whatever was said before, so that changes and the parts of a
beginning may come in any order. A router that takes no more misses nothing while its beginning waits for it; one that
takes no change begins anew later.

Names are `keys.short_names`: without the namespace, and so without the tenant's salt, nobody can tell what they name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter

from pdx.buffer.index import Index
from pdx.buffer.slots import BlockKey
from pdx.keys import short_names
from pdx.tiers.sealed import short_name_of
from pdx.tiers.tier import Tier, Watched
from pdx.wire import ARENA_BIT, DISK_BIT, DaemonRef, Holdings

TURN_S = 0.05  # between messages of changes: how old what routers know may be
PART_NAMES = 512  # of a message: half a millisecond of this thread, two of the router's
PARTS_A_TURN = 16  # of a beginning: 160,000 blocks a second
NAMED_A_TURN = 2048  # a name is a digest, of 1 us: 40,000 blocks a second, and a clear may take them all
ANEW_S = 1.0  # between two beginnings of one conversation

Send = Callable[[str, Holdings], bool]  # router endpoint; whether the message was taken


@dataclass
class _Conversation:
    number: int = 0  # of the next message
    begins_at: float = 0.0
    rest: Iterator[int] = field(default_factory=lambda: iter(()))  # names of the beginning that are still to be told
    part: list[int] = field(default_factory=list)  # of `rest`: the next to be told
    is_behind: bool = True  # a beginning is wanted


class HoldingsTeller:
    """Owned by the control thread."""

    def __init__(self, me: DaemonRef, index: Index, tier: Tier | None) -> None:
        self._me = me
        self._tiers: dict[int, int] = {}  # name -> bits
        self._shown = ARENA_BIT | DISK_BIT  # of these: a disk that hangs finds nothing of what it has
        self._changed: dict[int, None] = {}
        self._nameless: dict[BlockKey, bool] = {}  # of the arena: whether each is found now, which is to be noted
        self._conversations: dict[str, _Conversation] = {}
        self._due_at = 0.0
        index.told = self._in_arena
        if isinstance(tier, Watched):
            for name in tier.watch(self._on_disk, self._on_all_of_disk):
                self._on_disk(name, True)

    def __repr__(self) -> str:
        return f"<HoldingsTeller {len(self._tiers)} blocks, {len(self._conversations)} routers>"

    def number(self, router: str) -> int:
        """Of the next message to this router."""
        conversation = self._conversations.get(router)
        return conversation.number if conversation is not None else 0

    def resync(self, router: str) -> None:
        """It has missed something."""
        if router in self._conversations:
            self._conversations[router].is_behind = True

    def tick(self, routers: Collection[str], send: Send, now: float) -> None:
        """Tells every router what it does not know yet, if it is time."""
        if not routers:  # a conversation that nobody hears would have its changes kept for ever
            self._conversations.clear()
            self._changed.clear()
        if now < self._due_at:
            return
        self._due_at = now + TURN_S
        self._name_some()
        if not routers:
            return
        self._conversations = {router: self._conversations.get(router, _Conversation()) for router in routers}
        changed, self._changed = list(self._changed), {}
        for router, conversation in self._conversations.items():
            if conversation.is_behind and now >= conversation.begins_at:
                self._begin(conversation, now)
            elif not conversation.is_behind:
                self._tell_changes(router, conversation, changed, send)
            self._tell_parts(router, conversation, send)

    def _name_some(self) -> None:
        """Notes what is found in the arena. Names of one namespace cost less together."""
        keys = list(islice(self._nameless, NAMED_A_TURN))
        for namespace, group in groupby(keys, key=itemgetter(0)):
            of_one = list(group)
            names = short_names(namespace, [block_hash for _, block_hash in of_one])
            for key, name in zip(of_one, names, strict=True):
                self._note(name, ARENA_BIT, self._nameless.pop(key))

    def _begin(self, conversation: _Conversation, now: float) -> None:
        conversation.number, conversation.is_behind = 0, False
        conversation.begins_at = now + ANEW_S
        conversation.rest = iter(list(self._tiers))
        conversation.part = list(islice(conversation.rest, PART_NAMES))

    def _tell_changes(self, router: str, conversation: _Conversation, names: list[int], send: Send) -> None:
        for start in range(0, len(names), PART_NAMES):
            if not self._tell(router, conversation, names[start : start + PART_NAMES], send):
                conversation.is_behind = True
                return

    def _tell_parts(self, router: str, conversation: _Conversation, send: Send) -> None:
        for _ in range(PARTS_A_TURN):
            if conversation.is_behind or not conversation.part:
                return
            names = [name for name in conversation.part if self._tiers.get(name, 0) & self._shown]
            if (names or not conversation.number) and not self._tell(router, conversation, names, send):
                return  # the same part again in the next turn
            conversation.part = list(islice(conversation.rest, PART_NAMES))

    def _tell(self, router: str, conversation: _Conversation, names: Sequence[int], send: Send) -> bool:
        message = Holdings(
            daemon_id=self._me.daemon_id,
            incarnation=self._me.incarnation,
            number=conversation.number,
            names=struct.pack(f">{len(names)}Q", *names),
            tiers=bytes(self._tiers.get(name, 0) & self._shown for name in names),
        )
        taken = send(router, message)
        conversation.number += taken
        return taken

    def _in_arena(self, key: BlockKey, found: bool) -> None:
        self._nameless[key] = found

    def _on_disk(self, name: str, found: bool) -> None:
        self._note(short_name_of(name), DISK_BIT, found)

    def _on_all_of_disk(self, found: bool) -> None:
        """Each name of it changes: routers hear of all that there is anew, in parts."""
        self._shown = ARENA_BIT | DISK_BIT if found else ARENA_BIT
        for conversation in self._conversations.values():
            conversation.is_behind = True

    def _note(self, name: int, bit: int, found: bool) -> None:
        tiers = self._tiers.get(name, 0)
        tiers = tiers | bit if found else tiers & ~bit
        if tiers:
            self._tiers[name] = tiers
        else:
            self._tiers.pop(name, None)
        if self._conversations:
            self._changed[name] = None
