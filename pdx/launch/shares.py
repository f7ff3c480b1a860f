"""Cutting what a machine has into shares: its cores and GPUs among engines, an engine's cores among its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def shares(items: Sequence[T], count: int) -> list[tuple[T, ...]]:
    """`items` cut into `count` shares: contiguous ones if there are enough, else one item each, taken in turn."""
    if not items:
        return [()] * count
    if len(items) < count:
        return [(items[index % len(items)],) for index in range(count)]
    return [tuple(items[len(items) * i // count : len(items) * (i + 1) // count]) for i in range(count)]
