"""What is moved: spans of one size, some to a put, over all of a memory and in no order. Integers only."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pdx.transport.api import Copy


@dataclass(frozen=True)
class Shape:
    """`batch` spans of `span_bytes` in one put."""

    span_bytes: int
    batch: int

    @property
    def name(self) -> str:
        size = f"{self.span_bytes >> 20} MiB" if self.span_bytes >= 1 << 20 else f"{self.span_bytes >> 10} KiB"
        return f"{self.batch} x {size}"

    def puts(self, total_bytes: int) -> list[list[Copy]]:
        """They cover source and target once. Neighbours in a put are neighbours in neither, but by chance."""
        count = total_bytes // self.span_bytes // self.batch * self.batch
        chance = random.Random(self.span_bytes)
        sources, targets = chance.sample(range(count), count), chance.sample(range(count), count)
        copies = [
            Copy(source * self.span_bytes, target * self.span_bytes, self.span_bytes)
            for source, target in zip(sources, targets, strict=True)
        ]
        return [copies[start : start + self.batch] for start in range(0, count, self.batch)]


# One layer of one chunk has 192 KiB in the demo's model and 1 MiB in one of 8B parameters.
SHAPES = (Shape(64 << 10, 16), Shape(192 << 10, 16), Shape(1 << 20, 16), Shape(16 << 20, 1))
SLAB = Copy(0, 0, 64 << 10)
