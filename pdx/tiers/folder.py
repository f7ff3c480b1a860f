"""Files in one folder: written whole, published at once, read straight into the caller's memory. Knows no blocks.

    lock            held while a process owns the folder
    tmp/PID-N       being written; what a killed process left here is removed when the folder is opened
    ab/...cdefab    published by rename, under the last two digits of its name, which no two names need share
    ab/abcdef...    where earlier versions put it; read and deleted there
    tmp/left        names of files that were to be deleted when the folder was closed: those older than it are doomed

Nothing is synced to the medium: a kernel crash may leave torn files, and readers verify every byte they use anyway.
Losing a cached block costs less than a flush per block would. O_DIRECT where the file system can, so that the host's
page cache keeps no second copy; a request that is not aligned for it goes through the page cache and is counted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from pdx.errors import BadBlock, TierBroken, TierUnusable
from pdx.layout import ALIGN_BYTES

log = logging.getLogger(__name__)

_FOLDERS = [f"{number:02x}" for number in range(256)]
# Each folder takes a unit of the file system when it is made; beyond that, names are charged to their files.
FOLDER_UNITS = len(_FOLDERS) + 8
_UNIT_NAME = f"unit-{_FOLDERS[0]}"  # none of a tier's: what a crash leaves of it is overwritten
# What no setting is to blame for: the medium fails, has gone, is full or, as file systems become by errors, read-only.
_BROKEN = {
    errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.EUCLEAN,
    errno.EBADMSG, errno.ENOMEDIUM, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO,
}  # fmt: skip
# What this process or its machine lacks now: says nothing of the block that was asked for, nor of the disk.
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
# How a medium that answers says that it takes no writes. By any other error it may be one that can't be reached yet.
NO_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_LEFT = "left"
_IOV_MAX = 1024  # buffers per call: Linux's limit


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    size_bytes: int
    allocated_bytes: int
    written_at_ns: int
    is_doomed: bool = False  # an earlier life was to delete it: nobody is to find it any more


class LeftBehind(OSError):
    """A write failed, and what it had written can't be deleted: its bytes stay taken until its name is removed."""


class Files(Protocol):
    """What a disk tier needs of a file system. Called by several threads; each call blocks, and raises OSError."""

    @property
    def unaligned(self) -> int:
        """Requests so far that went through the page cache although it was to be avoided."""

    @property
    def unit_bytes(self) -> int:
        """A file takes a multiple of this, and so do its name, inode and block map, or a folder."""

    @property
    def stranded_bytes(self) -> int:
        """What lies in the folder beside published files and can't be deleted now."""

    @property
    def unseen(self) -> str:
        """Why there may be files that `scan` has not told of, a clause for people. Empty where there are none."""

    def scan(self) -> list[Found]:
        """All published files that can be read. Raises if no folder can."""

    def write(self, name: str, buffers: Sequence[memoryview]) -> int:
        """Publishes a file of these bytes and returns the bytes it takes on the medium. Raises LeftBehind."""

    def read(self, name: str, *, head: memoryview, rest: Sequence[memoryview]) -> int:
        """Fills `rest` with the file's last bytes and `head` with those before; returns how many these are.

        Raises BadBlock if the file's length does not allow that.
        """

    def remove(self, name: str) -> None:
        """And what a write of this name has left behind. No-op if there is nothing."""

    def leave(self, names: Sequence[str]) -> None:
        """The last call before `close`: these are still to be deleted, and doomed in the next life."""

    def close(self) -> None: ...


class Folder:
    """See Files."""

    def __init__(self, path: Path, lock: int, *, is_direct: bool) -> None:
        self.path = path
        self.is_direct = is_direct
        self.unaligned = 0
        self.unit_bytes = ALIGN_BYTES
        self.stranded_bytes = 0
        self._left_out = 0
        self._lock = lock
        self._old: set[str] = set()  # names of files that lie where earlier versions put them
        self._behind: dict[str, list[Path]] = {}  # by name: what failed writes could not delete
        self._numbers = itertools.count()

    @classmethod
    def open(cls, path: Path, *, direct: bool = True) -> Self:
        """Takes the folder over, making it if need be, and clears what was being written.

        Raises TierUnusable, naming the errno, if it can't be used or another process has it; TierBroken if the medium
        fails. One bad folder or file is left out, and told in the log.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in {*_FOLDERS, "tmp"} - set(os.listdir(path)):
                    (path / name).mkdir(mode=0o700)
                folder = cls(path, lock, is_direct=direct and _takes_direct(path / "lock"))
                folder._measure_unit()
                folder._clear_leftovers()
                return folder
            except BaseException:
                os.close(lock)
                raise
        except BlockingIOError as error:
            raise TierUnusable(f"{path} is in use by another pdxd: one folder serves one daemon") from error
        except OSError as error:
            raise unusable(path, error) from error

    def scan(self) -> list[Found]:
        found: dict[str, Found] = {}
        left, left_at_ns = self._read_left()
        unread = self._left_out = 0
        for folder in _FOLDERS:
            try:
                with os.scandir(self.path / folder) as entries:
                    for file in self._found_in(folder, entries):
                        is_doomed = file.name in left and file.written_at_ns <= left_at_ns
                        twin_bytes = found[file.name].allocated_bytes if file.name in found else 0  # at its old place
                        found[file.name] = replace(
                            file, allocated_bytes=file.allocated_bytes + twin_bytes, is_doomed=is_doomed
                        )
            except OSError as error:
                unread += 1
                if unread == len(_FOLDERS):
                    raise
                log.warning("%s/%s is left out of the disk tier: %s", self.path, folder, errno_name(error.errno))
        self._left_out += unread
        return list(found.values())

    @property
    def unseen(self) -> str:
        return f"{self._left_out} folders or files of {self.path} could not be read" if self._left_out else ""

    def write(self, name: str, buffers: Sequence[memoryview]) -> int:
        temporary = self.path / "tmp" / f"{os.getpid()}-{next(self._numbers)}"
        is_made = False
        try:
            with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._direct_flag) as fd:
                is_made = True
                # Asked for in one piece: no room is noticed before the work, and large files are not scattered.
                _allocate(fd, sum(buffer.nbytes for buffer in buffers))
                is_cached = self._transfer(os.pwritev, fd, buffers)
                if is_cached:
                    os.fdatasync(fd)  # bounds what waits in memory, and lets it be dropped
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                status = os.fstat(fd)
                # Some file systems (ZFS) say what a file takes some seconds later, and until then that it is nothing.
                allocated_bytes = max(status.st_blocks * 512, status.st_size)
            os.rename(temporary, self.path / part_of(name) / name)
        except (OSError, BadBlock) as error:
            if not is_made:  # a medium that is read-only now would not delete it either, and strand what is not there
                raise
            try:
                temporary.unlink(missing_ok=True)
            except OSError as second:
                self._behind.setdefault(name, []).append(temporary)
                raise LeftBehind(second.errno, f"{second.strerror}, after: {error}") from error
            raise
        return allocated_bytes

    def read(self, name: str, *, head: memoryview, rest: Sequence[memoryview]) -> int:
        with _opened(self._published(name), os.O_RDONLY | self._direct_flag) as fd:
            size_bytes = os.fstat(fd).st_size
            head_bytes = size_bytes - sum(buffer.nbytes for buffer in rest)
            if not 0 < head_bytes <= head.nbytes:
                raise BadBlock(f"its file has {size_bytes} bytes")
            if self._transfer(os.preadv, fd, [head[:head_bytes], *rest]):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return head_bytes

    def remove(self, name: str) -> None:
        for temporary in self._behind.get(name, ()):
            temporary.unlink(missing_ok=True)
        self._behind.pop(name, None)
        (self.path / part_of(name) / name).unlink(missing_ok=True)
        if name in self._old:
            self._published(name).unlink(missing_ok=True)
            self._old.discard(name)

    def leave(self, names: Sequence[str]) -> None:
        record = self.path / "tmp" / _LEFT
        if not names:
            record.unlink(missing_ok=True)
            return
        draft = record.with_name(f"{_LEFT}-{os.getpid()}")  # so that a crash leaves none or all
        draft.write_text("\n".join(names))
        draft.rename(record)

    def close(self) -> None:
        """Idempotent."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def __repr__(self) -> str:
        return f"<Folder {self.path}, {'direct' if self.is_direct else 'through the page cache'}>"

    def _found_in(self, folder: str, entries: Iterator[os.DirEntry[str]]) -> list[Found]:
        found = []
        for entry in entries:
            try:
                is_old = part_of(entry.name) != folder
                if (is_old and not entry.name.startswith(folder)) or not entry.is_file(follow_symlinks=False):
                    continue  # none of ours
                status = entry.stat(follow_symlinks=False)
                if is_old:
                    self._old.add(entry.name)
            except OSError as error:
                self._left_out += 1
                log.warning("%s is left out of the disk tier: %s", entry.path, errno_name(error.errno))
                continue
            found.append(Found(entry.name, status.st_size, status.st_blocks * 512, status.st_mtime_ns))
        return found

    def _measure_unit(self) -> None:
        """What a file takes at least. statvfs does not say it where blocks are given in clusters (ext4's bigalloc).

        If nothing can be written now, its word must do: what a file has really taken is charged in any case.
        """
        self.unit_bytes = max(self.unit_bytes, os.statvfs(self.path).f_frsize)
        with contextlib.suppress(OSError, BadBlock):
            block = memoryview(mmap.mmap(-1, ALIGN_BYTES))
            self.unit_bytes = max(self.unit_bytes, self.write(_UNIT_NAME, [block]))
            self.remove(_UNIT_NAME)

    def _clear_leftovers(self) -> None:
        """Of writes that a killed process had begun."""
        try:
            leftovers = list((self.path / "tmp").iterdir())
        except OSError as error:
            log.warning("%s/tmp can't be read: %s", self.path, errno_name(error.errno))
            return
        for leftover in leftovers:
            size_bytes = self.unit_bytes
            try:
                size_bytes = leftover.lstat().st_blocks * 512
                if leftover.name == _LEFT:
                    self.stranded_bytes += size_bytes  # for this life
                else:
                    leftover.unlink()
            except OSError as error:
                self.stranded_bytes += size_bytes
                log.warning("%s can't be deleted: %s", leftover, errno_name(error.errno))

    def _read_left(self) -> tuple[set[str], int]:
        """Names that an earlier life was to delete, and when it said so. What was written since is another matter."""
        record = self.path / "tmp" / _LEFT
        try:
            return set(record.read_text(errors="replace").split()), record.stat().st_mtime_ns
        except FileNotFoundError:
            return set(), 0
        except OSError as error:
            log.warning("%s can't be read: what it tells to delete is found again: %s", record, errno_name(error.errno))
            return set(), 0

    @property
    def _direct_flag(self) -> int:
        return os.O_DIRECT if self.is_direct else 0

    def _published(self, name: str) -> Path:
        return self.path / (name[:2] if name in self._old else part_of(name)) / name

    def _transfer(self, call: _Vectored, fd: int, buffers: Sequence[memoryview]) -> bool:
        """Whether it went through the page cache."""
        if self.is_direct:
            try:
                _move_all(call, fd, buffers)
                return False
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            # Which addresses and lengths O_DIRECT takes depends on device and kernel: asking is the only sure way.
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self.unaligned += 1
        _move_all(call, fd, buffers)
        return True


class _Vectored(Protocol):
    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int: ...


def unusable(path: Path, error: OSError) -> TierUnusable:
    """Whose fault it is that this folder can't be a tier."""
    complaint = f"{path} can't hold a disk tier: {error.strerror} ({errno_name(error.errno)})"
    return TierBroken(complaint, error.errno) if error.errno in _BROKEN else TierUnusable(complaint)


def part_of(name: str) -> str:
    """The folder of a published file: it may fail while others do not. Names differ at their ends, if not before."""
    return name[-2:]


def errno_name(number: int | None) -> str:
    return errno.errorcode.get(number or 0, f"errno {number}")


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _move_all(call: _Vectored, fd: int, buffers: Sequence[memoryview]) -> None:
    """All of `buffers`, from the file's start on, in as few calls as it takes. Raises BadBlock at the file's end."""
    left = list(buffers)
    offset = 0
    while left:
        moved = call(fd, left[:_IOV_MAX], offset)
        if not moved:
            raise BadBlock("its file is too short")
        offset += moved
        while left and moved >= left[0].nbytes:
            moved -= left.pop(0).nbytes
        if moved:
            left[0] = left[0][moved:]


def _allocate(fd: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        # Some file systems can't, and emulating it is impossible on a descriptor that takes aligned writes only.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _takes_direct(path: Path) -> bool:
    try:
        with _opened(path, os.O_RDONLY | os.O_DIRECT):
            return True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
