"""A fabric whose writes stay under way until they are let go: what a network does that nobody can hurry."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lane_pairs import example_fabric

from pdx.transport.api import Copy
from pdx.transport.fabric import Fabric, Memory, Transfer, host_memory
from pdx.transport.side import WAIT_S

F = TypeVar("F", bound=Fabric)


class HeldFabric:
    """See Fabric. The bytes are there at once; that they are is told when they are let go."""

    def __init__(self) -> None:
        self._inner = example_fabric()
        self.register, self.metadata = self._inner.register, self._inner.metadata
        self.add_peer, self.update_peer = self._inner.add_peer, self._inner.update_peer
        self.is_holding = True
        self.can_cut = False
        self.failure: Exception | None = None  # of every write
        self.written: list[Sequence[Copy]] = []
        self.under_way: list[Transfer] = []

    def write(self, peer: str, *, source: Memory, target: Memory, copies: Sequence[Copy]) -> Transfer:
        if self.failure is not None:
            raise self.failure
        transfer = self._inner.write(peer, source=source, target=target, copies=copies)
        self.under_way.append(transfer)
        self.written.append(copies)
        return transfer

    def is_done(self, transfer: Transfer) -> bool:
        if self.is_holding:
            return False
        self.under_way.remove(transfer)
        return True

    def drop_peer(self, peer: str, transfers: Sequence[Transfer]) -> bool:
        if not self.can_cut and any(transfer in self.under_way for transfer in transfers):
            return False
        self.under_way = [transfer for transfer in self.under_way if transfer not in transfers]
        return True

    def close(self) -> None:
        self.under_way.clear()


@contextlib.contextmanager
def two_of(make: Callable[[], F], nbytes: int) -> Iterator[tuple[F, F, Memory]]:
    """Two fabrics, and memory of this process that both have registered."""
    near, far = make(), make()
    view = memoryview(bytearray(nbytes))  # lives as long as they do: a Memory is but its address
    try:
        memory = host_memory(view)
        for fabric in (near, far):
            fabric.register(memory)
        yield near, far, memory
    finally:
        near.close()
        far.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """What a lane's thread does where no event tells of it: asked for again and again, under a deadline."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("not in time")
