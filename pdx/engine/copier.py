"""Copies pages between an engine's KV cache and slots of the arena, with their checksums. Host memory only.

Owns no state but its layout: caches and arena are given with each call, so that nothing keeps a dead daemon's arena
mapped. A page is bytes here; what they mean is the engine's business.

Checksums and digests are always taken of the *engine's* page: before it leaves, and after it has arrived. So they
cover both copies, the wire between them, and a slot that changed hands in the middle.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import blake3
import numpy as np
import numpy.typing as npt
import xxhash

from pdx.buffer.headers import Headers
from pdx.layout import PageLayout, Place

Pages = npt.NDArray[np.uint8]  # (blocks, page bytes) of one layer; each row contiguous


class Fault(enum.Enum):
    """Why a scattered page must not be used."""

    GENERATION = "generation"  # the slot was given to somebody else while we read
    CHECKSUM = "checksum"
    DIGEST = "digest"


class Copier:
    """Gathers and scatters pages of one layout. Call it from the thread that runs the model."""

    def __init__(self, layout: PageLayout, *, digest_mode: bool) -> None:
        self.layout = layout
        self.digest_mode = digest_mode

    def gather(
        self, pages: Pages, block_ids: Sequence[int], arena: Headers, places: Sequence[Place], layer: int
    ) -> None:
        """Copies engine blocks into their slots, then writes checksums, then raises watermarks."""
        slots = np.frombuffer(arena.memory, dtype=np.uint8)
        for block_id, place in zip(block_ids, places, strict=True):
            page = pages[block_id]
            start = place.page_offset(self.layout, layer)
            slots[start : start + self.layout.page_bytes] = page
            arena.set_checksum(place, layer, xxhash.xxh3_64_intdigest(page.data))
            if self.digest_mode:
                arena.set_digest(place, self.layout, layer, blake3.blake3(page.data).digest())
            self._raise_watermark(arena, place)

    def scatter(
        self, pages: Pages, block_ids: Sequence[int], arena: Headers, places: Sequence[Place], layer: int
    ) -> list[tuple[int, Fault]]:
        """Copies slots into engine blocks and verifies each copy. Returns (position in `places`, fault) of bad ones."""
        slots = np.frombuffer(arena.memory, dtype=np.uint8)
        faults = []
        for position, (block_id, place) in enumerate(zip(block_ids, places, strict=True)):
            page = pages[block_id]
            start = place.page_offset(self.layout, layer)
            page[:] = slots[start : start + self.layout.page_bytes]
            fault = self._fault(page, arena, place, layer)
            if fault is not None:
                faults.append((position, fault))
        return faults

    def _raise_watermark(self, arena: Headers, place: Place) -> None:
        """Layers come in order from hooks; those swept after the step fill gaps, which the checksums show."""
        before = after = arena.watermark(place.header_offset)
        while after < self.layout.layers and arena.checksum(place, after):
            after += 1
        if after > before:
            arena.set_watermark(place.header_offset, after)

    def _fault(self, page: Pages, arena: Headers, place: Place, layer: int) -> Fault | None:
        expected = arena.checksum(place, layer)
        digest = arena.digest(place, self.layout, layer) if self.digest_mode else b""
        # Read last: if it is still ours now, so were the bytes and the checksum read before.
        if arena.generation(place.header_offset) != place.generation:
            return Fault.GENERATION
        if xxhash.xxh3_64_intdigest(page.data) != expected:
            return Fault.CHECKSUM
        if self.digest_mode and blake3.blake3(page.data).digest() != digest:
            return Fault.DIGEST
        return None
