"""Clearing a tier: what of it a selection takes, by the names that its ledger keeps. Opens nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import msgspec

from pdx.buffer.selection import Selection
from pdx.tiers.ledger import Entry, Ledger
from pdx.tiers.sealed import label_of, labels_of, name_of


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

    def survey(self, which: Selection) -> Swept:
        """What `sweep` would take now."""

    def sweep(self, which: Selection) -> Swept:
        """No Read submitted from now on finds these blocks. Reads under way go on."""


def survey(ledger: Ledger, which: Selection, *, now: float) -> Swept:
    return _swept(_names_in(ledger.found(), which, now=now), ledger)


def sweep(ledger: Ledger, which: Selection, *, now: float, condemn: Callable[[str], None]) -> Swept:
    """`condemn`s what is found, and once more what was condemned before and is still there."""
    names, doomed = (_names_in(entries, which, now=now) for entries in (ledger.found(), ledger.doomed()))
    for name in names | doomed:
        condemn(name)
    return _swept(names, ledger)


def _names_in(entries: Iterable[Entry], which: Selection, *, now: float) -> dict[str, int]:
    """What of these is selected, with what it takes."""
    is_meant = _by_labels(which) if which.block_hashes is None else _by_names(which).__contains__
    return {
        entry.name: entry.charged_bytes
        for entry in entries
        if now - entry.since >= which.older_s and is_meant(entry.name)
    }


def _swept(names: dict[str, int], ledger: Ledger) -> Swept:
    return Swept(blocks=len(names), size_bytes=sum(names.values()), leaving=ledger.leaving)


def _by_labels(which: Selection) -> Callable[[str], bool]:
    spaces = None if which.spaces is None else {label_of(space) for space in which.spaces}
    tenant = None if which.tenant is None else label_of(which.tenant)

    def is_meant(name: str) -> bool:
        space_label, tenant_label = labels_of(name)
        return (spaces is None or space_label in spaces) and tenant in (None, tenant_label)

    return is_meant


def _by_names(which: Selection) -> set[str]:
    assert which.spaces is not None and which.tenant is not None and which.block_hashes is not None
    return {name_of((space + which.tenant, name)) for space in which.spaces for name in which.block_hashes}
