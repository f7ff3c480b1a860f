"""What a tier keeps and how many bytes it takes: names, charges, and who may be evicted. Pure; knows no medium.

The cap is kept by order of work: a write carries its victims, which are deleted before its first byte is written. So
while it is open it can take no more than the larger of the two, and that is what `used_bytes` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pdx.buffer.evict import Policy
from pdx.errors import IllegalTransition, IntegrityError

Group = tuple[str, str]  # what two names have in common if they are of one group
EntryEvent = Literal["publish", "give_up", "strand", "doom", "spare", "delete"]


class EntryState(StrEnum):
    WRITING = "writing"
    KEPT = "kept"
    DOOMED = "doomed"
    GONE = "gone"


MOVES: dict[tuple[EntryState, EntryEvent], EntryState] = {
    (EntryState.WRITING, "publish"): EntryState.KEPT,
    (EntryState.WRITING, "give_up"): EntryState.GONE,
    (EntryState.WRITING, "strand"): EntryState.DOOMED,
    (EntryState.KEPT, "doom"): EntryState.DOOMED,
    (EntryState.DOOMED, "spare"): EntryState.KEPT,
    (EntryState.DOOMED, "delete"): EntryState.GONE,
}


@dataclass(slots=True)
class Entry:
    name: str
    charged_bytes: int
    state: EntryState
    since: float = 0.0  # on its owner's clock
    readers: int = 0  # while there are some it is no victim
    is_condemned: bool = False  # no longer found, and doomed when its last reader is gone
    victims: tuple[str, ...] = ()  # of an open write
    overlap_bytes: int = 0  # what this write and its victims never take at once

    @property
    def is_leaving(self) -> bool:
        """Found no more; but a victim is spared if the write that it makes room for fails."""
        return self.is_condemned or self.state is EntryState.DOOMED


class Ledger:
    """One thread. Names are opaque; those of one `group_of` can be asked for together."""

    def __init__(
        self, *, cap_bytes: int, policy: Policy[str], group_of: Callable[[str], Group] = lambda name: ("", "")
    ) -> None:
        self.cap_bytes = cap_bytes
        self.policy = policy
        self.evicted = 0
        self.changes = 0  # grows with all that may make `finds` say something else
        # Hears of each name that `finds` finds from now on (True), or no longer; not of those that are adopted.
        self.told: Callable[[str, bool], None] = lambda name, found: None
        self.is_stuck: Callable[[str], bool] = lambda name: False  # what can't be deleted now is no victim
        self._group_of = group_of
        self._entries: dict[str, Entry] = {}
        self._groups: dict[Group, dict[str, None]] = {}  # the names of all entries; none is empty
        self._charged_bytes = 0
        self._overlap_bytes = 0
        self._kept = 0
        self._leaving = 0

    @property
    def used_bytes(self) -> int:
        return self._charged_bytes - self._overlap_bytes

    def state(self, name: str) -> EntryState:
        entry = self._entries.get(name)
        return EntryState.GONE if entry is None else entry.state

    def finds(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and entry.state is EntryState.KEPT and not entry.is_condemned

    def found(self) -> list[Entry]:
        """All that `finds` finds."""
        return [entry for entry in self._entries.values() if self.finds(entry.name)]

    def entries(self, names: Iterable[str]) -> list[Entry]:
        """Those of these names, in whatever state."""
        return [entry for name in names if (entry := self._entries.get(name)) is not None]

    @property
    def groups(self) -> Mapping[Group, Collection[str]]:
        """The names of all entries."""
        return self._groups

    @property
    def leaving(self) -> int:
        """How many are found no more and have not left the medium yet, whoever deletes them."""
        return self._leaving

    def adopt(self, name: str, charged_bytes: int, *, since: float = 0.0) -> None:
        """One that the medium has from an earlier life; the youngest come last. May go beyond the cap."""
        self._add(Entry(name, charged_bytes, EntryState.KEPT, since))
        self.policy.touched([name])

    def reserve(self, name: str, charged_bytes: int, *, now: float = 0.0) -> tuple[str, ...] | None:
        """Room for a new name: who must be deleted first. None, with nothing changed, if there is none now."""
        assert name not in self._entries, f"{name} is reserved twice"
        victims = self._choose(charged_bytes)
        if victims is None:
            return None
        for victim in victims:
            self.policy.evicted(victim)
            self._move(self._entries[victim], "doom")
        freed_bytes = sum(self._entries[victim].charged_bytes for victim in victims)
        entry = Entry(name, charged_bytes, EntryState.WRITING, now, victims=victims)
        entry.overlap_bytes = min(charged_bytes, freed_bytes)
        self._overlap_bytes += entry.overlap_bytes
        self._add(entry)
        return victims

    def settle(
        self, name: str, *, deleted: Collection[str], published_bytes: int | None, is_stranded: bool = False
    ) -> list[str]:
        """A write's end: which of its victims are deleted, and what it really takes (None: it failed).

        A failed write is forgotten, unless it is stranded: what it left behind could not be deleted and stays charged.
        Returns what is to be deleted: that, and the victims that were spared and condemned meanwhile.
        """
        entry = self._entries[name]
        condemned = []
        for victim in entry.victims:
            if victim in deleted:
                self.evicted += 1
                self.delete(victim)
            else:
                self._move(self._entries[victim], "spare")
                if self._entries[victim].is_condemned:
                    self._move(self._entries[victim], "doom")
                    condemned.append(victim)
                else:
                    self.policy.touched([victim])
        self._overlap_bytes -= entry.overlap_bytes
        entry.victims, entry.overlap_bytes = (), 0
        if published_bytes is None:
            if is_stranded:
                self._move(entry, "strand")
                return [*condemned, name]
            self._move(entry, "give_up")
            self._forget(entry)
            return condemned
        self._charged_bytes += published_bytes - entry.charged_bytes
        entry.charged_bytes = published_bytes
        self._move(entry, "publish")
        self.policy.touched([name])
        return condemned

    def used(self, chain: Sequence[str]) -> None:
        """Those of them that are found, in chain order, were used."""
        self.policy.touched([name for name in chain if self.finds(name)])

    def begin_read(self, name: str) -> None:
        """No use by itself: blocks of a chain are read one by one, and the head, read first, would go first."""
        entry = self._entries[name]
        assert entry.state is EntryState.KEPT, f"{name} is {entry.state}"
        entry.readers += 1

    def end_read(self, name: str) -> bool:
        """Whether the name is now to be deleted."""
        entry = self._entries[name]
        entry.readers -= 1
        if entry.readers:
            return False
        if entry.is_condemned:
            self._move(entry, "doom")
            return True
        return False

    def condemn(self, name: str) -> bool:
        """It is found no more. Whether it is to be deleted at once, for nobody reads it."""
        entry = self._entries.get(name)
        if entry is not None and entry.state is EntryState.DOOMED:
            entry.is_condemned = True  # even if it is spared
        if entry is None or not self.finds(name):
            return False
        entry.is_condemned = True
        self._leaving += 1
        self.changes += 1
        self.told(name, False)
        self.policy.removed(name)
        if entry.readers:
            return False
        self._move(entry, "doom")
        return True

    def delete(self, name: str) -> None:
        """A doomed name has left the medium."""
        entry = self._entries[name]
        self._move(entry, "delete")
        self._forget(entry)

    def surplus(self) -> list[str]:
        """Dooms and returns what must go to come under the cap again: after a start with a smaller one."""
        doomed = []
        left_bytes = self.used_bytes
        for name in list(self.policy.victims()) if left_bytes > self.cap_bytes else ():
            if left_bytes <= self.cap_bytes:
                break
            left_bytes -= self._entries[name].charged_bytes
            doomed.append(name)
        for name in doomed:
            self.condemn(name)
        return doomed

    def __len__(self) -> int:
        """How many can be found, or are being read for the last time."""
        return self._kept

    def __repr__(self) -> str:
        return f"<Ledger {len(self)} kept of {len(self._entries)}, {self.used_bytes} of {self.cap_bytes} bytes>"

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the sums add up. Takes time linear in all entries."""
        entries = self._entries.values()
        _require(sum(entry.charged_bytes for entry in entries) == self._charged_bytes, "charges are lost")
        _require(sum(entry.overlap_bytes for entry in entries) == self._overlap_bytes, "overlaps are lost")
        _require(sum(entry.is_leaving for entry in entries) == self._leaving, "leaving names are counted wrong")
        groups: dict[Group, set[str]] = {}
        for name in self._entries:
            groups.setdefault(self._group_of(name), set()).add(name)
        _require({group: set(names) for group, names in self._groups.items()} == groups, "groups are not of the names")
        found = {entry.name for entry in self.found()}
        _require(sum(entry.state is EntryState.KEPT for entry in entries) == self._kept, "kept names are counted wrong")
        _require(set(self.policy) == found, "the policy's names are not those that are found")
        _require(len(self.policy) == len(found), "the policy counts wrong")
        victims = [victim for entry in entries for victim in entry.victims]
        _require(len(victims) == len(set(victims)), "a victim makes room for two")
        for victim in victims:
            _require(self.state(victim) is EntryState.DOOMED, f"the victim {victim} is {self.state(victim)}")
        for entry in entries:
            _require(not entry.readers or entry.state is EntryState.KEPT, f"{entry} is read")

    def _choose(self, wanted_bytes: int) -> tuple[str, ...] | None:
        short_bytes = self.used_bytes + wanted_bytes - self.cap_bytes
        victims: list[str] = []
        for victim in self.policy.victims() if short_bytes > 0 else ():
            if self._entries[victim].readers or self.is_stuck(victim):
                continue
            victims.append(victim)
            short_bytes -= self._entries[victim].charged_bytes
            if short_bytes <= 0:
                break
        return tuple(victims) if short_bytes <= 0 else None

    def _add(self, entry: Entry) -> None:
        self._entries[entry.name] = entry
        self._charged_bytes += entry.charged_bytes
        self._kept += entry.state is EntryState.KEPT
        self._groups.setdefault(self._group_of(entry.name), {})[entry.name] = None

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.name]
        self._leaving -= entry.is_leaving
        group = self._group_of(entry.name)
        del self._groups[group][entry.name]
        if not self._groups[group]:
            del self._groups[group]
        self.policy.forgotten(entry.name)
        self._charged_bytes -= entry.charged_bytes

    def _move(self, entry: Entry, event: EntryEvent) -> None:
        if (entry.state, event) not in MOVES:
            raise IllegalTransition(f"{event} of {entry}")
        before = self.finds(entry.name)
        self._kept -= entry.state is EntryState.KEPT
        self._leaving -= entry.is_leaving
        entry.state = MOVES[entry.state, event]
        self.changes += 1
        self._kept += entry.state is EntryState.KEPT
        self._leaving += entry.is_leaving
        if before != self.finds(entry.name):
            self.told(entry.name, not before)


def _require(truth: bool, complaint: str) -> None:
    if not truth:
        raise IntegrityError(complaint)
