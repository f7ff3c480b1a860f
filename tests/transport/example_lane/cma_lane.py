"""An example: a lane in one file, in a package that is not pdx. It writes into processes of its own host.

process_vm_writev is a one-sided write, so everything but the write is pdx's OneSidedLane: proof of the key, windows,
order, notices, deadlines. What is left is a Fabric: here every transfer is done when write() returns.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence

from pdx.errors import PeerGone
from pdx.transport.api import Copy
from pdx.transport.fabric import Memory, Transfer
from pdx.transport.onesided import OneSidedLane

VECTORS_MAX = 1024  # the kernel's IOV_MAX
SETTLE_S = 0.5  # nothing writes for a process that is gone


class Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class CmaLane(OneSidedLane):
    """See Lane."""

    def __init__(self, url: str, *, key: bytes | None, name: str) -> None:
        super().__init__(url, scheme="cma", key=key, name=name, make_fabric=CmaFabric, settle_s=SETTLE_S)


class CmaFabric:
    """See Fabric. A peer is a process id: whoever proved the key may name its own."""

    def __init__(self) -> None:
        self._write = ctypes.CDLL(None, use_errno=True).process_vm_writev
        self._write.restype = ctypes.c_ssize_t
        self._write.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]
        self._numbers = itertools.count(1)

    def register(self, memory: Memory) -> None:
        """Nothing to do: the kernel reaches all of a process."""

    def metadata(self) -> bytes:
        return str(os.getpid()).encode()

    def add_peer(self, metadata: bytes) -> str:
        if not metadata.isdigit():
            raise PeerGone("the peer does not tell its process id")
        return metadata.decode()

    def update_peer(self, peer: str, metadata: bytes) -> None:
        """Nothing to learn: the kernel reaches all of a process."""

    def write(self, peer: str, *, source: Memory, target: Memory, copies: Sequence[Copy]) -> Transfer:
        for start in range(0, len(copies), VECTORS_MAX):
            some = copies[start : start + VECTORS_MAX]
            vectors = Vector * len(some)
            ours = vectors(*[(source.address + copy.source_offset, copy.length) for copy in some])
            theirs = vectors(*[(target.address + copy.target_offset, copy.length) for copy in some])
            written = self._write(int(peer), ours, len(some), theirs, len(some), 0)
            if written != sum(copy.length for copy in some):
                raise PeerGone(f"process {peer} cannot be written to: {os.strerror(ctypes.get_errno())}")
        return Transfer(next(self._numbers))

    def is_done(self, transfer: Transfer) -> bool:
        return True

    def drop_peer(self, peer: str, transfers: Sequence[Transfer]) -> bool:
        return True  # nothing is ever under way

    def close(self) -> None:
        """Nothing is held."""
