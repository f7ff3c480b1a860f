"""Eviction policies for slots, by the names that settings have for them."""

from __future__ import annotations

from collections.abc import Callable

from pdx.buffer.evict import Lru, Policy
from pdx.buffer.s3fifo import S3Fifo
from pdx.buffer.slots import BlockKey, Slot
from pdx.config import Eviction


def _first_key(slot: Slot) -> BlockKey | None:
    """A prompt that comes back may be cut into other slots, but they begin at the same blocks more often than not."""
    return next(filter(None, slot.keys), None)


POLICIES: dict[Eviction, Callable[[], Policy[Slot]]] = {"lru": Lru, "s3fifo": lambda: S3Fifo(_first_key)}
