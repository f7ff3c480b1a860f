from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from pdx.buffer.arena import Arena
from pdx.buffer.headroom import memory_available
from pdx.errors import ConfigError, MemoryShort, Refused
from pdx.layout import ALIGN_BYTES

SIZE = 64 << 10

CLIENT = """
import os, sys
from pdx.buffer.arena import Arena
fd, size = int(sys.argv[1]), int(sys.argv[2])
for length in (0, 4096, 2 * size):
    try:
        os.ftruncate(fd, length)
    except PermissionError:
        continue
    sys.exit(f"truncated to {length}")
with Arena.attach(fd, size) as arena:
    assert bytes(arena.memory[8192:8197]) == b"hello"
    arena.memory[8192:8197] = b"world"
    arena.set_fence(16, 7)
"""


def test_another_process_shares_the_bytes_and_cannot_resize_them() -> None:
    with Arena.create(SIZE) as arena:
        arena.memory[8192:8197] = b"hello"
        command = [sys.executable, "-c", CLIENT, str(arena.fd), str(SIZE)]
        client = subprocess.run(command, pass_fds=(arena.fd,), capture_output=True, text=True, timeout=60)
        assert client.returncode == 0, client.stderr
        assert bytes(arena.memory[8192:8197]) == b"world"
        assert arena.fence(16) == 7


def test_seals_hold_for_the_creator_too() -> None:
    with Arena.create(SIZE) as arena:
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, ALIGN_BYTES)
        with pytest.raises(PermissionError):
            fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_an_attached_arena_sees_writes_both_ways_and_owns_its_descriptor() -> None:
    with Arena.create(SIZE) as arena:
        fd = os.dup(arena.fd)
        with Arena.attach(fd, SIZE) as attached:
            arena.memory[-1] = 9
            assert attached.memory[-1] == 9
            attached.memory[5000] = 8
            assert arena.memory[5000] == 8
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_sizes_are_whole_pages() -> None:
    with Arena.create(SIZE + 1, populate=False) as arena:
        assert arena.bytes_total == len(arena.memory) == SIZE + ALIGN_BYTES


def test_attach_refuses_what_is_not_sealed() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(Refused, match="not sealed"):
        Arena.attach(fd, SIZE)
    os.close(fd)


def test_attach_refuses_another_size() -> None:
    with Arena.create(SIZE) as arena, pytest.raises(Refused, match=f"{SIZE} bytes where {2 * SIZE}"):
        Arena.attach(arena.fd, 2 * SIZE)


def test_attach_refuses_what_is_no_memfd() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(Refused, match="no memfd"):
        Arena.attach(read_end, SIZE)
    os.close(read_end)
    os.close(write_end)


def test_an_arena_beyond_the_machine_is_refused_with_both_numbers_and_a_fix() -> None:
    asked_bytes = 2 * memory_available() + (1 << 30)
    with pytest.raises(
        MemoryShort, match=rf"{-(-asked_bytes // 4096) * 4096 >> 20} MiB .* available.*set arena to \d+MiB"
    ):
        Arena.create(asked_bytes)
    assert issubclass(MemoryShort, ConfigError)


def test_close_is_idempotent_and_leaves_other_files_alone() -> None:
    arena = Arena.create(SIZE)
    arena.close()
    reused = os.open("/dev/null", os.O_RDONLY)
    arena.close()
    os.fstat(reused)
    os.close(reused)
    with pytest.raises(ValueError, match="released"):
        arena.memory[0]


def test_views_of_others_survive_close() -> None:
    arena = Arena.create(SIZE)
    view = arena.memory[4096:8192]
    arena.close()
    view[0] = 3
    assert view[0] == 3


def test_repr() -> None:
    with Arena.create(1 << 20) as arena:
        assert repr(arena) == f"<Arena 1 MiB, fd {arena.fd}>"
    assert repr(arena) == "<Arena 1 MiB, closed>"
