"""What a disk tier's threads do: one job at a time, from its request's buffers to a file or back. Decides nothing."""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from pdx.errors import BadBlock
from pdx.layout import ALIGN_BYTES, round_up
from pdx.tiers import sealed
from pdx.tiers.folder import Files, errno_name
from pdx.tiers.tier import Read, Request, Write

log = logging.getLogger(__name__)


class Probe:
    """Asks whether the medium answers: writes a small file, reads it and deletes it."""


@dataclass(eq=False, slots=True)
class Job:
    """One thing for a thread to do. The thread fills in the second half; nobody else looks until it is back."""

    name: str
    ticket: int  # 0 for what nobody waits for: deletions and probes
    request: Request | Probe | None
    victims: tuple[str, ...] = ()

    deleted: list[str] = field(default_factory=list)
    allocated_bytes: int | None = None  # None: nothing was published
    meta: bytes = b""
    seconds: float = 0.0
    error: Exception | None = None

    @property
    def why(self) -> str:
        """Of `error`, for people."""
        if isinstance(self.error, OSError):
            return f"{self.error.strerror} ({errno_name(self.error.errno)})"
        return str(self.error)

    @property
    def errno(self) -> int:
        """Of the system call that failed; 0 if none did."""
        return (self.error.errno or 0) if isinstance(self.error, OSError) else 0


class Work:
    """Called by many threads at once. `done` gets every job back, whatever became of it.

    `write_failed` is called before, on the same thread: the next write would delete its victims, and fail as well.
    """

    def __init__(
        self, files: Files, sealer: sealed.Sealer, *, done: Callable[[Job], None], write_failed: Callable[[], None]
    ) -> None:
        self._files = files
        self._sealer = sealer
        self._done = done
        self._write_failed = write_failed
        self._own = threading.local()

    def run(self, job: Job) -> None:
        started_at = time.monotonic()
        try:
            match job.request:
                case Write():
                    self._write(job, job.request)
                case Read():
                    self._read(job, job.request)
                case Probe():
                    self._ask(job)
                case None:
                    self._remove(job, job.name)
                case _:
                    assert_never(job.request)
        except (OSError, BadBlock) as error:
            job.error = error
        except Exception as error:  # the top of a thread: this request fails, the tier goes on
            log.exception("a request to the disk tier failed in an unforeseen way")
            job.error = error
        job.seconds = time.monotonic() - started_at
        if job.error is not None and isinstance(job.request, Write):
            self._write_failed()
        self._done(job)

    def _write(self, job: Job, request: Write) -> None:
        for victim in job.victims:
            self._remove(job, victim)
        header = self._sealer.seal(request.key, request.pages, request.meta)
        head, padding = self._scratch(request.pages)
        head[: len(header)] = header
        padding[:] = bytes(padding.nbytes)
        buffers = _nonempty(head[: len(header)], *request.pages, padding)
        job.allocated_bytes = self._files.write(job.name, buffers)

    def _read(self, job: Job, request: Read) -> None:
        head, padding = self._scratch(request.pages)
        head_bytes = self._files.read(job.name, head=head, rest=_nonempty(*request.pages, padding))
        job.meta = self._sealer.unseal(bytes(head[:head_bytes]), request.key, request.pages)
        if any(padding):
            raise BadBlock("its padding is not empty")

    def _ask(self, job: Job) -> None:
        head, _ = self._scratch(())
        block = head[:ALIGN_BYTES]
        block[:] = os.urandom(ALIGN_BYTES)
        written = bytes(block)
        try:
            job.allocated_bytes = self._files.write(job.name, [block])
            block[:] = bytes(ALIGN_BYTES)
            self._files.read(job.name, head=block, rest=[])
        finally:
            self._files.remove(job.name)
        if block != written:
            raise BadBlock("it gives back other bytes than were written")

    def _remove(self, job: Job, name: str) -> None:
        self._files.remove(name)
        job.deleted.append(name)

    def _scratch(self, pages: Sequence[memoryview]) -> tuple[memoryview, memoryview]:
        """This thread's own room for a header, and for what the payload lacks to whole blocks of the disk: aligned."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = memoryview(mmap.mmap(-1, sealed.HEADER_BYTES_MAX + ALIGN_BYTES))
        scratch: memoryview = self._own.scratch
        payload_bytes = bytes_of(pages)
        padding_bytes = round_up(payload_bytes, ALIGN_BYTES) - payload_bytes
        return scratch[: sealed.HEADER_BYTES_MAX], scratch[sealed.HEADER_BYTES_MAX :][:padding_bytes]


def bytes_of(pages: Sequence[memoryview]) -> int:
    return sum(page.nbytes for page in pages)


def _nonempty(*buffers: memoryview) -> list[memoryview]:
    return [buffer for buffer in buffers if buffer.nbytes]
