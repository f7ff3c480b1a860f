"""Clearing a tier: what of it a selection takes, by the names that its ledger keeps. Opens nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol, runtime_checkable

import msgspec

from pdx.buffer.selection import Selection
from pdx.tiers.ledger import Entry, Group, Ledger
from pdx.tiers.sealed import label_of, names_of


class Swept(msgspec.Struct, frozen=True):
    """Blocks that reads would have found, and what they take of the tier.

    `leaving`: all that is found no more and has not left the medium yet. A tier that is killed before finds it again.
    """

    blocks: int = 0
    size_bytes: int = 0
    leaving: int = 0


@runtime_checkable
class Sweeper(Protocol):
    """What a tier can do that knows its names. Called by the thread that calls the tier."""

    @property
    def unseen(self) -> str:
        """Why the medium may have blocks that this life has not seen, and a later one may find. Empty if it has none.

        A clause for people.
        """

    def survey(self, which: Selection) -> Swept:
        """What `sweep` would take now."""

    def sweep(self, which: Selection) -> Swept:
        """No Read submitted from now on finds these blocks. Reads under way go on."""


def survey(ledger: Ledger, which: Selection, *, now: float) -> Swept:
    found = [entry for entry in _meant(ledger, which, now=now) if ledger.finds(entry.name)]
    return _swept(found, ledger)


def sweep(ledger: Ledger, which: Selection, *, now: float, condemn: Callable[[str], None]) -> Swept:
    """`condemn`s what is found, and once more what was condemned before and is still there."""
    meant = _meant(ledger, which, now=now)
    found = [entry for entry in meant if ledger.finds(entry.name)]
    for entry in meant:
        condemn(entry.name)
    return _swept(found, ledger)


def _swept(found: Sequence[Entry], ledger: Ledger) -> Swept:
    size_bytes = sum(entry.charged_bytes for entry in found)
    return Swept(blocks=len(found), size_bytes=size_bytes, leaving=ledger.leaving)


def _meant(ledger: Ledger, which: Selection, *, now: float) -> list[Entry]:
    """In whatever state. Looks up what is named, else at the spaces and tenants that are meant: others may be large."""
    named = which.named()
    if named is not None:
        keys = ((namespace, block_hash) for namespace, hashes in named.items() for block_hash in hashes)
        entries = ledger.entries(names_of(keys))
    else:
        is_meant = _by_labels(which)
        names = [names for labels, names in ledger.groups.items() if is_meant(labels)]
        entries = ledger.entries(chain.from_iterable(names))
    return [entry for entry in entries if now - entry.since >= which.older_s]


def _by_labels(which: Selection) -> Callable[[Group], bool]:
    spaces = None if which.spaces is None else {label_of(space) for space in which.spaces}
    others = {label_of(space) for space in which.other_than}
    tenant = None if which.tenant is None else label_of(which.tenant)

    def is_meant(labels: Group) -> bool:
        space_label, tenant_label = labels
        is_of_space = (spaces is None or space_label in spaces) and space_label not in others
        return is_of_space and tenant in (None, tenant_label)

    return is_meant
