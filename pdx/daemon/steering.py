"""Lookup, pin, unpin and clear: answered by whoever owns the index, on its own thread, so that an answer is the truth.

All are idempotent: asked twice they change nothing more, and their counts say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import assert_never

from msgspec.structs import replace

from pdx.buffer.selected import Selected
from pdx.buffer.selection import Selection
from pdx.daemon.pins import Pins
from pdx.daemon.ports import Desk
from pdx.daemon.prefixes import Prefixes
from pdx.daemon.spaces import KnownSpaces
from pdx.daemon.tiering import Tiering
from pdx.errors import Refused
from pdx.verbs import Clear, Cleared, Found, Lookup, Pin, Result, Steer, TierCleared, Unpin

log = logging.getLogger("pdxd")


class Steering:
    """Owned by the control thread."""

    def __init__(
        self,
        desk: Desk,
        prefixes: Prefixes,
        tiering: Tiering | None,
        pins: Pins,
        spaces: KnownSpaces,
        *,
        clear_under_way: Callable[[Selection, float], None],
    ) -> None:
        """`clear_under_way`: of handoffs, what is not in the arena yet, or is on its way into another one as cache."""
        self._clear_under_way = clear_under_way
        self._desk = desk
        self._prefixes = prefixes
        self._tiering = tiering
        self._pins = pins
        self._spaces = spaces

    def steer(self, what: Steer, now: float, *, room: bool) -> Result:
        """Raises Refused, changing nothing."""
        match what:
            case Lookup():
                return self._look_up(what)
            case Pin():
                return self._pins.pin(what, now, room=room)
            case Unpin():
                return self._pins.unpin(what)
            case Clear():
                return self._clear(what, now)
            case _:
                assert_never(what)

    def clear_what_can_be(self, space: bytes, now: float) -> None:
        """All of this space that is known in any tier; in the arena alone where the tier below can't be cleared."""
        clear = Clear(spaces=[space])
        try:
            self._clear(clear, now, wholly=False)
        except Refused as error:
            log.warning("a reset clears the arena only: %s", error)
            self._clear(replace(clear, tier="arena"), now)

    def _look_up(self, what: Lookup) -> Found:
        block_tokens = self._spaces.get(what.space).content.block_tokens
        return self._prefixes.leading(what.space + what.tenant, what.block_hashes, block_tokens=block_tokens)

    def _clear(self, what: Clear, now: float, *, wholly: bool = True) -> Cleared:
        if what.block_hashes is not None and (what.tenant is None or what.spaces is None):
            raise Refused("a prompt's blocks have a tenant and a space: name them")
        spaces = None if what.spaces is None else frozenset(what.spaces)
        if what.model is not None:
            spaces = self._spaces.of_model(what.model).union(what.spaces or ())
            self._check_known(what, spaces, now)
        which = Selection(
            spaces=spaces,
            tenant=what.tenant,
            block_hashes=None if what.block_hashes is None else frozenset(what.block_hashes),
            older_s=what.older_s,
        )
        store, tiering = self._desk.store, self._tiering
        arena, disk = TierCleared(), TierCleared()
        if what.tier != "arena" and tiering is not None:
            tiering.check_clearable(wholly=wholly)  # before anything has changed
        taken = None
        if what.tier != "disk":
            taken = store.survey(which, now=now) if what.dry_run else store.clear(which, now=now)
            arena = _counted(taken)
            if not what.dry_run:
                self._clear_under_way(which, now)
        if what.tier != "arena" and tiering is not None:
            disk = tiering.survey(which) if what.dry_run else tiering.clear(which)
        pins_ended = 0
        if not what.dry_run:
            pins_ended = self._pins.end_cleared(taken) if taken is not None else 0
            self._desk.ports.counters["blocks_cleared"] += arena.blocks + disk.blocks
        return Cleared(arena=arena, disk=disk, pins_ended=pins_ended, dry_run=what.dry_run)

    def _check_known(self, what: Clear, spaces: frozenset[bytes], now: float) -> None:
        """Raises Refused if what is kept may be this model's as well. Names of blocks tell a space, and no model."""
        unknown = Selection(other_than=spaces | self._spaces.all(), tenant=what.tenant, older_s=what.older_s)
        blocks = 0
        if what.tier != "disk":
            blocks += len(self._desk.store.survey(unknown, now=now).blocks)
        if what.tier != "arena" and self._tiering is not None:
            blocks += self._tiering.survey(unknown).blocks
        if blocks:
            raise Refused(
                f"{blocks} blocks are of kinds that this daemon has never met, and may be {what.model}'s: let their "
                "engines attach once, or clear without naming a model"
            )


def _counted(selected: Selected) -> TierCleared:
    return TierCleared(
        blocks=len(selected.blocks), size_bytes=selected.size_bytes, held=selected.held, filling=len(selected.filling)
    )
