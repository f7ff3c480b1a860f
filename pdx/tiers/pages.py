"""A block in the arena as a tier sees it: buffers, and the words of its header that travel with them.

What is kept beside the pages is what the block's next reader needs to check them: their checksums and digests, as the
engine that computed them left them. A block is restored only into a place of the very same page layout.
"""

from __future__ import annotations

import struct

from pdx.buffer.headers import Headers
from pdx.errors import BadBlock
from pdx.layout import CHECKSUM_BYTES, DIGEST_BYTES, HEADER_FIXED_BYTES, PageLayout, Place

_SHAPE = struct.Struct("<II")  # layers, page bytes


def pages_of(arena: Headers, place: Place, layout: PageLayout) -> list[memoryview]:
    """The block's bytes by layer, in place. One buffer if it has its slot for itself: then they lie side by side."""
    if place.slot_blocks == 1:
        return [arena.memory[place.slot_offset : place.slot_offset + layout.block_bytes]]
    starts = (place.page_offset(layout, layer) for layer in range(layout.layers))
    return [arena.memory[start : start + layout.page_bytes] for start in starts]


def meta_of(arena: Headers, place: Place, layout: PageLayout) -> bytes:
    """What to keep beside the pages of a block that is whole."""
    start, stop = _kept(place, layout)
    return _SHAPE.pack(layout.layers, layout.page_bytes) + bytes(arena.memory[start:stop])


def restore(arena: Headers, place: Place, layout: PageLayout, meta: bytes) -> None:
    """Gives a loaded block its header back and declares all of its layers filled. Raises BadBlock, changing nothing."""
    start, stop = _kept(place, layout)
    shape, words = meta[: _SHAPE.size], meta[_SHAPE.size :]
    if shape != _SHAPE.pack(layout.layers, layout.page_bytes) or len(words) != stop - start:
        raise BadBlock("it was kept by another layout")
    arena.memory[start:stop] = words
    for shard in range(layout.shards):
        arena.set_watermark(place.header_offset, layout.shard_layers, shard)


def _kept(place: Place, layout: PageLayout) -> tuple[int, int]:
    start = place.header_offset + HEADER_FIXED_BYTES
    return start, start + layout.layers * (CHECKSUM_BYTES + DIGEST_BYTES)
