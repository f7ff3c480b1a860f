"""The disk tier: one file per block under a hard cap. Decides on the control thread, works on threads of its own.

A write carries the names that must be deleted before it, so that the cap holds at every moment. A block that can't be
read back exactly is a miss and is deleted. A sick disk is paused or switched off rather than waited for (`health`); one
that hangs is noticed by the next call of any method, so let no more than seconds pass without one. It is well again,
with all that it kept, when every call has come back and a small file of ours was written, read and deleted in time.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Self, assert_never

from pdx.buffer.evict import Lru, Policy
from pdx.buffer.selection import Selection
from pdx.errors import BadBlock, ClosedTier, TierBroken, TierUnusable
from pdx.layout import round_up
from pdx.tiers import sealed
from pdx.tiers.adopt import adopt, bequeath
from pdx.tiers.broken import BrokenFiles
from pdx.tiers.crew import Crew, Inbox
from pdx.tiers.deletions import Deletions
from pdx.tiers.folder import FOLDER_UNITS, NO_WRITES, SHORTAGES, Files, Folder, LeftBehind, part_of, unusable
from pdx.tiers.health import Health, State
from pdx.tiers.ledger import EntryState, Ledger
from pdx.tiers.sore import Sore
from pdx.tiers.sweep import Swept, survey, sweep
from pdx.tiers.tier import (
    End,
    Event,
    Failed,
    Key,
    Loaded,
    Missed,
    Read,
    Request,
    StateChanged,
    TierStats,
    Write,
    Written,
)
from pdx.tiers.work import Job, Probe, Work, bytes_of

# Two requests of 2 MiB keep a fast disk busy; more threads hide the time of opening, hashing and renaming.
READERS = 4
WRITERS = 2
# At 2 MiB each an eighth of a second of a 1 GB/s disk. More would only hold slots that others could use.
OPEN_READS_MAX = 64
OPEN_WRITES_MAX = 64
STALL_S = 30.0  # a call to the kernel that takes this long will not come back in time for anybody
_CLOSE_S = 5.0  # for calls under way when the tier closes; a disk that takes longer hangs
# Of a disk that hung. Within the blocks that are charged for the folders; if it stays behind, the next life deletes it.
PROBE_NAME = "0" * sealed.NAME_LENGTH

log = logging.getLogger(__name__)


class DiskTier:
    """See Tier. `files` is taken over and closed with the tier; `secret` makes its files unforgeable."""

    def __init__(
        self,
        files: Files,
        *,
        cap_bytes: int,
        secret: bytes | None = None,
        policy: Policy[str] | None = None,
        readers: int = READERS,
        writers: int = WRITERS,
        health: Health | None = None,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # A unit for a file's name, inode and block map: 300 bytes when all is well, a block when it is scattered.
        self._unit_bytes = files.unit_bytes
        self._beside_bytes = FOLDER_UNITS * self._unit_bytes + files.stranded_bytes
        least_bytes = 2 * FOLDER_UNITS * self._unit_bytes + files.stranded_bytes
        if cap_bytes < least_bytes:
            raise TierUnusable(f"a disk tier takes at least {least_bytes} bytes, its folders among them")
        sealer = sealed.Sealer(secret)
        self.files = files
        self.ledger = Ledger(
            cap_bytes=cap_bytes - self._beside_bytes, policy=Lru() if policy is None else policy,
            group_of=sealed.labels_of,
        )  # fmt: skip
        self.health = Health() if health is None else health
        self._sore = Sore()
        self.ledger.is_stuck = lambda name: self._sore.rests(part_of(name), now=clock())
        self._stall_s = stall_s
        self._clock = clock
        self._open: dict[int, Job] = {}
        self._open_reads = 0
        undeleted = adopt(files, self.ledger, now=clock())
        self._deletions = Deletions(
            undeleted, may_begin=lambda: not self._is_closed and self.health.finds,
            begin=lambda name: self._writes.add(Job(name, 0, None)), now=clock(),
        )  # fmt: skip
        self._events: list[Event] = []
        self._tickets = count(1)
        self._counts = dict.fromkeys(("loaded", "missed", "written", "failed", "refused", "bad_blocks", "io_errors"), 0)
        self._state_changes = 0
        self._errno = 0  # of the last one
        self._undeleted_why = ""  # the last one
        self._probe: Job | None = None  # under way, since:
        self._probe_began_at = 0.0
        self._is_closed = False
        self._told_all: Callable[[bool], None] = lambda finds: None
        self._found_before = self.health.finds
        self._inbox: Inbox[Job] = Inbox()
        self._work = Work(files, sealer, done=self._inbox.add, write_failed=lambda: self._writes.hold())
        self._reads = Crew("pdx-disk-read", threads=readers, work=self._work.run, clock=clock)
        self._writes = Crew("pdx-disk-write", threads=writers, work=self._work.run, clock=clock)

    @classmethod
    def open(
        cls, path: Path, *, cap_bytes: int, secret: bytes | None = None, policy: Policy[str] | None = None
    ) -> Self:
        """The tier in this folder, with what it kept from earlier lives. Raises TierUnusable, or TierBroken."""
        files = Folder.open(path)
        try:
            return cls(files, cap_bytes=cap_bytes, secret=secret, policy=policy)
        except OSError as error:
            files.close()
            raise unusable(path, error) from error
        except BaseException:
            files.close()
            raise

    @classmethod
    def off(cls, error: TierBroken, *, cap_bytes: int) -> Self:
        """In the place of one that can't be opened: who looks at the daemon sees that it has none now, and why."""
        tier = cls(BrokenFiles(error.errno), cap_bytes=cap_bytes, health=Health(state=State.OFF))
        tier._changed(str(error), error.errno)
        return tier

    def fileno(self) -> int:
        return self._inbox.fileno()

    def submit(self, request: Request) -> int | None:
        if self._is_closed:
            raise ClosedTier("the disk tier is closed")
        self._look_after_health()
        match request:
            case Write():
                sealed.check_sizes(request.key, request.meta, bytes_of(request.pages))
                most = 1 if self.health.state is State.TRYING else OPEN_WRITES_MAX
                is_full = len(self._open) - self._open_reads >= most
            case Read():
                is_full = self._open_reads >= OPEN_READS_MAX
            case _:
                assert_never(request)
        if is_full:
            self._counts["refused"] += 1
            return None
        job = Job(sealed.name_of(request.key), next(self._tickets), request)
        end = self._begin_write(job, request) if isinstance(request, Write) else self._begin_read(job)
        if end is not None:
            self._say(end)
        return job.ticket

    def cancel(self, ticket: int) -> None:
        job = self._open.get(ticket)
        if job is not None and (self._reads.withdraw(job) or self._writes.withdraw(job)):
            self._settle_unbegun(job, "cancelled")

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        self._look_after_health()
        if not self.health.finds:
            return [False] * len(keys)
        return list(map(self.ledger.finds, sealed.names_of(keys)))

    def used(self, chain: Sequence[Key]) -> None:
        self.ledger.used(sealed.names_of(chain))

    def remove(self, key: Key) -> None:
        self._condemn(sealed.name_of(key))

    @property
    def unseen(self) -> str:
        return self.files.unseen

    def survey(self, which: Selection) -> Swept:
        return survey(self.ledger, which, now=self._clock())

    def sweep(self, which: Selection) -> Swept:
        """Files are deleted by the tier's threads; one that hangs or can't write keeps them for its next life."""
        return sweep(self.ledger, which, now=self._clock(), condemn=self._condemn)

    def watch(self, told: Callable[[str, bool], None], told_all: Callable[[bool], None]) -> list[str]:
        self._told_all = told_all
        self.ledger.told = told
        if not self.health.finds:
            told_all(False)
        return [entry.name for entry in self.ledger.found()]

    def take_events(self) -> list[Event]:
        self._settle_all()
        self._look_after_health()
        events, self._events = self._events, []
        return events

    def stats(self) -> TierStats:
        return TierStats(
            state=self.health.state, blocks=len(self.ledger),
            used_bytes=self.ledger.used_bytes + self._beside_bytes,
            cap_bytes=self.ledger.cap_bytes + self._beside_bytes, errno=self._errno,
            open_reads=self._open_reads, open_writes=len(self._open) - self._open_reads,
            evicted=self.ledger.evicted, changes=self.ledger.changes + self._state_changes,
            unaligned=self.files.unaligned, **self._counts,
        )  # fmt: skip

    def close(self, *, drain_s: float) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        deadline = time.monotonic() + drain_s
        crews = (self._reads, self._writes)
        for crew in crews:
            crew.wait_idle(max(0.0, deadline - time.monotonic()))
        self._withdraw_all("the tier was closed")
        self._settle_all()
        for name in self._deletions.take_all():
            self._writes.add(Job(name, 0, None))
        self._writes.wait_idle(max(0.0, deadline - time.monotonic()))
        left = [job.name for job in self._writes.withdraw_all()]
        have_ended = [crew.close(_CLOSE_S) for crew in crews]
        self._settle_all()
        if all(have_ended):  # else the folder stays locked: a call that hangs may still write
            if self.health.state is not State.HUNG:  # lest we wait for it
                bequeath(self.files, [*left, *self._deletions.take_all()])
            self.files.close()
        self._inbox.close()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the accounts add up."""
        self.ledger.check_integrity()

    def __repr__(self) -> str:
        return f"<DiskTier {self.health.state}, {self.ledger}, {len(self._open)} open>"

    # -- control thread: beginnings

    def _begin_write(self, job: Job, request: Write) -> End | None:
        if self.health.state not in (State.WELL, State.TRYING):
            again = self.health.state is not State.OFF
            return Failed(job.ticket, f"the disk tier is {self.health.state}", again=again)
        state = self.ledger.state(job.name)
        if state is EntryState.KEPT and self.ledger.finds(job.name):
            return Written(job.ticket, 0.0)
        if state is not EntryState.GONE:
            return Failed(job.ticket, "this block is just being written or deleted")
        file_bytes = sealed.file_bytes(request.key, request.meta, bytes_of(request.pages))
        size_bytes = round_up(file_bytes, self._unit_bytes) + self._unit_bytes
        if self._sore.rests(part_of(job.name), now=self._clock()):
            return Failed(job.ticket, "its folder takes no writes, though others do")
        if size_bytes > self.ledger.cap_bytes:
            return Failed(job.ticket, f"{size_bytes} bytes are more than the whole tier may take")
        victims = self.ledger.reserve(job.name, size_bytes, now=self._clock())
        if victims is None:
            return Failed(job.ticket, "all that could make room is in use")
        job.victims = victims
        self._open[job.ticket] = job
        self._writes.add(job)
        return None

    def _begin_read(self, job: Job) -> End | None:
        if not self.health.finds or not self.ledger.finds(job.name):
            return Missed(job.ticket, "unknown")
        self.ledger.begin_read(job.name)
        self._open[job.ticket] = job
        self._open_reads += 1
        self._reads.add(job)
        return None

    def _condemn(self, name: str) -> None:
        if self.ledger.condemn(name):
            self._deletions.add(name)

    # -- control thread: ends

    def _settle_all(self) -> None:
        for job in self._inbox.take():
            self._settle(job)

    def _settle(self, job: Job) -> None:
        self._open.pop(job.ticket, None)
        match job.request:
            case Write():
                end = self._settle_write(job)
            case Read():
                end = self._settle_read(job)
            case Probe():
                self._settle_probe(job)
                return
            case None:
                self._settle_deletion(job)
                return
            case _:
                assert_never(job.request)
        self._say(end)

    def _settle_write(self, job: Job) -> End:
        published_bytes = None if job.allocated_bytes is None else job.allocated_bytes + self._unit_bytes
        is_stranded = isinstance(job.error, LeftBehind)
        condemned = self.ledger.settle(
            job.name, deleted=job.deleted, published_bytes=published_bytes, is_stranded=is_stranded
        )
        for name in condemned:
            self._deletions.add(name)
        self._judge_write(job)
        if job.error is None:
            return Written(job.ticket, job.seconds)
        again = isinstance(job.error, OSError) and job.error.errno != errno.EFBIG  # which it will be the next time, too
        return Failed(job.ticket, job.why, job.errno, again)

    def _settle_read(self, job: Job) -> End:
        self._open_reads -= 1
        is_short = job.errno in SHORTAGES
        is_sick = job.error is not None and not isinstance(job.error, BadBlock | FileNotFoundError)
        if job.error is not None:
            self._counts["bad_blocks" if isinstance(job.error, BadBlock) else "io_errors"] += 1
            became = "can't be read now" if is_short else "is gone"
            log.warning("a block of the disk tier %s: %s: %s", became, job.name, job.why)
        if job.error is not None and not is_short:
            self._condemn(job.name)
        if self.ledger.end_read(job.name):
            self._deletions.add(job.name)
        if not is_short and self.health.read(ok=not is_sick):
            self._changed(f"reads fail one after the other: {job.why}", job.errno)
        if job.error is None:
            return Loaded(job.ticket, job.meta, job.seconds)
        return Missed(job.ticket, job.why)

    def _settle_deletion(self, job: Job) -> None:
        remaining = self._deletions.ended(job.name, deleted=bool(job.deleted), now=self._clock())
        if job.deleted:
            self.ledger.delete(job.name)
        else:
            # It stays doomed, and charged, and is tried again. No judgement on the disk: it may be one bad folder.
            self._counts["io_errors"] += 1
            self._undeleted_why = job.why
        if remaining:
            why = self._undeleted_why
            log.warning("%d files of the disk tier (%r) can't be deleted now: %s", remaining, self.files, why)

    def _settle_unbegun(self, job: Job, reason: str, *, again: bool = False) -> None:
        self._open.pop(job.ticket, None)
        match job.request:
            case Write():
                for name in self.ledger.settle(job.name, deleted=(), published_bytes=None):
                    self._deletions.add(name)
            case Read():
                self._open_reads -= 1
                if self.ledger.end_read(job.name):
                    self._deletions.add(job.name)
            case Probe():
                self._probe = None
                return
            case None:
                self._deletions.withdrawn(job.name)
                return
            case _:
                assert_never(job.request)
        self._say(Failed(job.ticket, reason, again=again))

    def _withdraw_all(self, reason: str, *, again: bool = False) -> None:
        for job in self._reads.withdraw_all():
            self._settle_unbegun(job, reason, again=again)
        self._withdraw_writes(reason, again=again)

    def _withdraw_writes(self, reason: str, *, again: bool) -> None:
        """The last one first: who puts each before those that wait has them in their order again."""
        for job in reversed(self._writes.withdraw_all()):
            self._settle_unbegun(job, reason, again=again)
        self._writes.go_on()

    def _judge_write(self, job: Job) -> None:
        now = self._clock()
        culprit = next((victim for victim in job.victims if victim not in job.deleted), job.name)
        sore = self._sore.wrote(part_of(culprit), ok=job.error is None, now=now)
        if sore is not None:
            log.warning("folder %s of the disk tier (%r) takes no writes: it is left alone for now", sore, self.files)
        has_changed = self.health.wrote(ok=job.error is None, now=now)
        if job.error is None:
            if has_changed:
                self._changed("it takes writes again", 0)
            return
        self._counts["io_errors"] += 1
        if has_changed:
            self._changed(f"a write failed: {job.why}", job.errno)
        self._withdraw_writes("the disk takes no writes now", again=True)

    def _look_after_health(self) -> None:
        now = self._clock()
        self.health.tick(now)
        self._deletions.tick(now)
        if self._is_stuck(now) and self.health.hangs(now=now):
            self._changed(f"a call has not come back for {self._stall_s:g} s", 0)
            self._withdraw_all("the disk hangs", again=True)
        if self._probe is None and not self._is_closed and self.health.wants_probe(now=now):
            self._probe, self._probe_began_at = Job(PROBE_NAME, 0, Probe()), now
            self._writes.add(self._probe)

    def _is_stuck(self, now: float) -> bool:
        started = (crew.oldest_started_at() for crew in (self._reads, self._writes))
        return any(started_at is not None and now - started_at > self._stall_s for started_at in started)

    def _settle_probe(self, job: Job) -> None:
        self._probe = None
        now = self._clock()
        is_late = now - self._probe_began_at > self._stall_s or self._is_stuck(now)
        takes_writes = job.allocated_bytes is not None or job.errno not in NO_WRITES
        if job.error is not None and takes_writes:
            log.warning("the disk tier (%r) is asked again later: %s", self.files, job.why)
        elif not is_late and self.health.answered(takes_writes=takes_writes, now=now):
            again = "it answers again" if takes_writes else f"it answers again: {job.why}"
            self._changed(again, job.errno)
            self._deletions.again()

    def _changed(self, reason: str, error_number: int) -> None:
        self._state_changes += 1
        self._errno = error_number
        if self.health.finds != self._found_before:
            self._found_before = self.health.finds
            self._told_all(self.health.finds)
        state = self.health.state
        level = logging.INFO if state is State.WELL else logging.ERROR
        log.log(level, "the disk tier (%r) is %s: %s", self.files, state, reason)
        self._events.append(StateChanged(state, reason, error_number))
        self._inbox.announce()

    def _say(self, end: End) -> None:
        match end:
            case Written():
                self._counts["written"] += 1
            case Loaded():
                self._counts["loaded"] += 1
            case Missed():
                self._counts["missed"] += 1
            case Failed():
                self._counts["failed"] += 1
            case _:
                assert_never(end)
        self._events.append(end)
        self._inbox.announce()
