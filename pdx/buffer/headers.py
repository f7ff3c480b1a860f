"""Block headers and fence words: the few words of an arena that daemon and engines read and write side by side.

Works on any memory laid out as pdx.layout says; knows nothing of slots, leases or where the memory comes from. Every
word is aligned and in native order (an arena never leaves its host), so that no process sees half of one. Whoever
follows a watermark still checks checksum and generation after its copy: they, and not the order in which stores
become visible, say that a page is whole.
"""

from __future__ import annotations

from functools import lru_cache

from pdx.layout import CHECKSUM_BYTES, CONTROL_BYTES, DIGEST_BYTES, HEADER_FIXED_BYTES, PageLayout, Place

_FENCE_BYTES = 8


class Headers:
    """Accessors over `memory`, whose length is a multiple of 8. Any thread; one writer per word."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self._words = memory.cast("I")
        self._longs = memory.cast("Q")

    def reset(self, header_offset: int, pages: PageLayout, generation: int) -> None:
        """Begins a block's new life: `generation` first, so that a late reader of the old one notices."""
        self._words[header_offset >> 2] = generation
        rest = header_offset + 4
        self.memory[rest : header_offset + pages.header_bytes] = _zeros(pages.header_bytes - 4)

    def generation(self, header_offset: int) -> int:
        return self._words[header_offset >> 2]

    def watermark(self, header_offset: int, shard: int = 0) -> int:
        """How many leading layers of this shard of the block are filled."""
        return self._words[(header_offset >> 2) + 1 + shard]

    def set_watermark(self, header_offset: int, layers: int, shard: int = 0) -> None:
        self._words[(header_offset >> 2) + 1 + shard] = layers

    def checksum(self, place: Place, layer: int) -> int:
        """xxh3-64 of the page, 0 before it is filled."""
        return self._longs[(place.header_offset + HEADER_FIXED_BYTES + layer * CHECKSUM_BYTES) >> 3]

    def set_checksum(self, place: Place, layer: int, checksum: int) -> None:
        self._longs[(place.header_offset + HEADER_FIXED_BYTES + layer * CHECKSUM_BYTES) >> 3] = checksum

    def digest(self, place: Place, pages: PageLayout, layer: int) -> bytes:
        """blake3 of the page; zeros unless digest mode is on."""
        start = place.digest_offset(pages, layer)
        return bytes(self.memory[start : start + DIGEST_BYTES])

    def set_digest(self, place: Place, pages: PageLayout, layer: int, digest: bytes) -> None:
        start = place.digest_offset(pages, layer)
        self.memory[start : start + DIGEST_BYTES] = digest

    def fence(self, offset: int) -> int:
        """The last step that the worker owning this word has finished. Raises ValueError outside the control page."""
        return self._longs[_fence_index(offset)]

    def set_fence(self, offset: int, step: int) -> None:
        self._longs[_fence_index(offset)] = step


def _fence_index(offset: int) -> int:
    if offset % _FENCE_BYTES or not 0 <= offset < CONTROL_BYTES:
        raise ValueError(f"no fence word lies at offset {offset}")
    return offset // _FENCE_BYTES


@lru_cache(maxsize=16)  # one per layout in use
def _zeros(length: int) -> bytes:
    return bytes(length)
