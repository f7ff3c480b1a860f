"""The host's shared memory: one sealed memfd, mapped by pdxd and by each engine's worker.

Owns the file descriptor and this process's mapping. Knows nothing of slots or leases. Sealed, because a client that
could shrink the file would kill every other process with SIGBUS at its next access.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from types import TracebackType
from typing import Self

from pdx.buffer.headers import Headers
from pdx.buffer.headroom import memory_available
from pdx.errors import MemoryShort, Refused
from pdx.layout import ALIGN_BYTES, CONTROL_BYTES, round_up

# Left to everybody else: a machine filled to the last page starts killing processes.
RESERVE_BYTES = 64 << 20

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_POPULATE_WRITE = 23  # Linux 5.14; missing from the mmap module
# The call does not give up the GIL: other threads and Ctrl-C get their turn between steps of some 50 ms.
_POPULATE_STEP_BYTES = 64 << 20
_MIB = 1 << 20


class Arena(Headers):
    """A mapped arena. `memory` spans all of it, `fd` may be passed to other processes of this user.

    Make one with `create` or `attach`. Any thread may read and write; the thread that made it closes it.
    """

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        super().__init__(memoryview(mapping))
        self.fd = fd
        self.bytes_total = len(mapping)
        self._mapping = mapping

    @classmethod
    def create(cls, bytes_total: int, *, populate: bool = True) -> Self:
        """A new arena of at least `bytes_total` bytes, all of them backed by memory if `populate`.

        Raises MemoryShort, with nothing taken, if the machine or its cgroup can't give that much.
        """
        bytes_total = round_up(max(bytes_total, CONTROL_BYTES), ALIGN_BYTES)
        check_memory(bytes_total)
        fd = os.memfd_create("pdx-arena", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, bytes_total)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls._mapped(fd, bytes_total, populate=populate)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, bytes_total: int) -> Self:
        """Maps and populates an arena that another process created. Takes over `fd` unless it raises.

        Raises Refused if `fd` is no sealed memfd of that size, MemoryShort if it can't be mapped.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size_bytes = os.fstat(fd).st_size
        except OSError as error:
            raise Refused(f"the descriptor received is no memfd: {error.strerror}") from error
        if seals & _SEALS != _SEALS:
            raise Refused("the arena received is not sealed: its owner could cut it off under this process")
        if size_bytes != bytes_total:
            raise Refused(f"the arena received has {size_bytes} bytes where {bytes_total} were announced")
        return cls._mapped(fd, bytes_total, populate=True)

    @classmethod
    def _mapped(cls, fd: int, bytes_total: int, *, populate: bool) -> Self:
        try:
            mapping = mmap.mmap(fd, bytes_total)
            if populate:
                _populate(mapping)
        except OSError as error:
            raise MemoryShort(f"mapping an arena of {bytes_total // _MIB} MiB failed: {error.strerror}") from error
        return cls(fd, mapping)

    def close(self) -> None:
        """Gives back descriptor and mapping. Idempotent. Views that others still hold keep the mapping alive."""
        if self.fd < 0:
            return
        os.close(self.fd)
        # The number will be reused: a second close must not hit somebody else's file.
        self.fd = -1
        for resource in (self._words.release, self._longs.release, self.memory.release, self._mapping.close):
            try:
                resource()
            except BufferError:
                # A tensor or slice still points here. The mapping goes when the last of them does.
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"fd {self.fd}" if self.fd >= 0 else "closed"
        return f"<Arena {self.bytes_total / _MIB:g} MiB, {state}>"


def check_memory(bytes_total: int) -> None:
    """Raises MemoryShort unless an arena of so many bytes fits."""
    available = memory_available()
    if bytes_total + RESERVE_BYTES > available:
        fitting_mib = max(0, available - RESERVE_BYTES) // _MIB
        raise MemoryShort(
            f"an arena of {bytes_total // _MIB} MiB does not fit: this machine or its cgroup has "
            f"{available // _MIB} MiB available, of which {RESERVE_BYTES // _MIB} stay free; "
            f"set arena to {fitting_mib}MiB or less"
        )


def _populate(mapping: mmap.mmap) -> None:
    """Faults every page in now: later each first touch would cost the thread that makes it, and could be fatal."""
    for start in range(0, len(mapping), _POPULATE_STEP_BYTES):
        length = min(_POPULATE_STEP_BYTES, len(mapping) - start)
        try:
            mapping.madvise(_MADV_POPULATE_WRITE, start, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # An older kernel. Reading allocates pages of a shared mapping too and, unlike writing, is harmless
            # where another process is at work already.
            with memoryview(mapping) as view, view[start : start + length : mmap.PAGESIZE] as one_byte_per_page:
                one_byte_per_page.tobytes()
