"""What a one-sided lane needs from a library that writes into a peer's memory. Knows no windows and no peers' rights.

A fabric moves bytes between registered memories and says when they are there. Who may write where, notices, order,
cancelling and every wait are the lane's (see onesided); hence a new fabric is a page of code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal, NewType, Protocol

import msgspec

from pdx.transport.api import Copy

MemoryKind = Literal["DRAM", "VRAM"]
Transfer = NewType("Transfer", int)


class Memory(msgspec.Struct, frozen=True):
    """Bytes as a fabric sees them. `device` counts GPUs; host memory is on device 0."""

    address: int
    length: int
    kind: MemoryKind = "DRAM"
    device: int = 0


class Fabric(Protocol):
    """Thread-safe; only write() may take as long as a copy. Foreign errors leave as PeerGone."""

    def register(self, memory: Memory) -> None:
        """Raises ConfigError if the library can't."""

    def metadata(self) -> bytes:
        """What a peer must add_peer() to write into all that is registered: power, for proven peers only."""

    def add_peer(self, metadata: bytes) -> str:
        """A name for one channel's way to the peer, good until it is dropped. Names may be equal: then each channel's
        drop_peer() ends that channel's use only, and the others' goes on."""

    def update_peer(self, peer: str, metadata: bytes) -> None:
        """The peer has registered more since it was added. What is under way goes on."""

    def write(self, peer: str, *, source: Memory, target: Memory, copies: Sequence[Copy]) -> Transfer:
        """Starts one transfer; the copies lie inside both memories. If it raises, part of it may be under way."""

    def is_done(self, transfer: Transfer) -> bool:
        """Whether every byte is where it belongs. True once; the transfer is forgotten then.

        If it raises, the transfer has ended, or ends with all others of that peer.
        """

    def drop_peer(self, peer: str, transfers: Sequence[Transfer]) -> bool:
        """Ends one channel's use of a peer. `transfers`: those of that channel that have not ended, or not well; they
        are forgotten.

        False, and nothing is forgotten, as long as one of them may touch memory: some libraries can't take back what
        they have posted. Ask again later.
        """

    def close(self) -> None:
        """Afterwards no memory is touched through this fabric, by us or by whoever needs our help for it."""


def host_memory(view: memoryview) -> Memory:
    """Where a buffer lies. The view, if kept, keeps it there."""
    if not view.nbytes:
        return Memory(address=0, length=0)
    return Memory(address=ctypes.addressof(ctypes.c_char.from_buffer(view)), length=view.nbytes)
