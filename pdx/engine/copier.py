"""Copies pages between an engine's KV cache and slots of the arena, with their checksums. Host memory only.

Owns no state but its layout: caches and arena are given with each call, so that nothing keeps a dead daemon's arena
mapped. A page is bytes here; what they mean is the engine's business.

Checksums and digests are always taken of the *engine's* page: before it leaves, and after it has arrived. So they
cover both copies, the wire between them, and a slot that changed hands in the middle. Each is taken while its page is
in the core's own cache, where it costs a tenth of the copy; so pages go one by one, whatever lies side by side.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import blake3
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pdx.buffer.headers import Headers
from pdx.layout import CHECKSUM_BYTES, HEADER_FIXED_BYTES, PageLayout, Place

Pages = npt.NDArray[np.uint8]  # (blocks, page bytes) of one layer; each row contiguous


class Fault(enum.Enum):
    """Why a scattered page must not be used."""

    GENERATION = "generation"  # the slot was given to somebody else while we read
    CHECKSUM = "checksum"
    DIGEST = "digest"


class Rows:
    """One layer of an engine's KV cache as flat memory: block n starts at n * stride_bytes.

    Slices of a memoryview cost a third of what numpy's rows do, and copy at the same speed.
    """

    def __init__(self, pages: Pages) -> None:
        blocks, page_bytes = pages.shape
        self.stride_bytes = pages.strides[0]
        span_bytes = (blocks - 1) * self.stride_bytes + page_bytes
        self.memory = np.lib.stride_tricks.as_strided(pages, (span_bytes,), (1,)).data


class Copier:
    """Gathers and scatters pages of one shard of a layout, whose layers it counts from 0.

    Call it from the thread that runs the model.
    """

    def __init__(self, layout: PageLayout, *, shard: int = 0, digest_mode: bool) -> None:
        self.layout = layout
        self.shard = shard
        self.digest_mode = digest_mode
        self._first = layout.slot_layer(shard, 0)

    def gather(self, rows: Rows, block_ids: Sequence[int], arena: Headers, places: Sequence[Place], layer: int) -> None:
        """Copies engine blocks into their slots, then writes checksums, then raises watermarks."""
        memory, stride_bytes, page_bytes = rows.memory, rows.stride_bytes, self.layout.page_bytes
        slots, longs, layer = arena.memory, arena.memory.cast("Q"), self._first + layer
        checksum_bytes = HEADER_FIXED_BYTES + layer * CHECKSUM_BYTES
        for block_id, place in zip(block_ids, places, strict=True):
            start = block_id * stride_bytes
            page = memory[start : start + page_bytes]
            target = place.slot_offset + (layer * place.slot_blocks + place.position) * page_bytes
            slots[target : target + page_bytes] = page
            longs[(place.header_offset + checksum_bytes) >> 3] = xxh3_64_intdigest(page)
            if self.digest_mode:
                arena.set_digest(place, self.layout, layer, blake3.blake3(page).digest())
            self._raise_watermark(arena, place)

    def scatter(
        self, rows: Rows, block_ids: Sequence[int], arena: Headers, places: Sequence[Place], layer: int
    ) -> list[tuple[int, Fault]]:
        """Copies slots into engine blocks and verifies each copy. Returns (position in `places`, fault) of bad ones."""
        memory, stride_bytes, page_bytes = rows.memory, rows.stride_bytes, self.layout.page_bytes
        slots, words, longs = arena.memory, arena.memory.cast("I"), arena.memory.cast("Q")
        layer = self._first + layer
        checksum_bytes = HEADER_FIXED_BYTES + layer * CHECKSUM_BYTES
        faults = []
        for position, (block_id, place) in enumerate(zip(block_ids, places, strict=True)):
            start, header = block_id * stride_bytes, place.header_offset
            page = memory[start : start + page_bytes]
            source = place.slot_offset + (layer * place.slot_blocks + place.position) * page_bytes
            page[:] = slots[source : source + page_bytes]
            expected = longs[(header + checksum_bytes) >> 3]
            digest = arena.digest(place, self.layout, layer) if self.digest_mode else b""
            # Read last: if it is still ours now, so were the bytes and the checksum read before.
            if words[header >> 2] != place.generation:
                faults.append((position, Fault.GENERATION))
            elif xxh3_64_intdigest(page) != expected:
                faults.append((position, Fault.CHECKSUM))
            elif self.digest_mode and blake3.blake3(page).digest() != digest:
                faults.append((position, Fault.DIGEST))
        return faults

    def _raise_watermark(self, arena: Headers, place: Place) -> None:
        """Layers come in order from hooks; those swept after the step fill gaps, which the checksums show."""
        before = after = arena.watermark(place.header_offset, self.shard)
        while after < self.layout.shard_layers and arena.checksum(place, self._first + after):
            after += 1
        if after > before:
            arena.set_watermark(place.header_offset, after, self.shard)
