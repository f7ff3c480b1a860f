"""Integer arithmetic of the arena: where extents, slots, slabs, pages and headers lie. No memory, no torch.

    arena   [ control page | extent 0 | extent 1 | ... ]
    extent  [ headers of its units | unit 0 | unit 1 | ... ]          one layout per extent at a time
    slot    2^n consecutive units, holding 2^n consecutive blocks of one hash chain (a chunk, or part of one)
    slab    one layer of a slot: its blocks' pages side by side        what a lane streams
    page    one block in one layer: what an engine copies

A unit is the room one block needs in all layers, rounded up to 4 KiB so that slots suit O_DIRECT. Inside a slot of
`slot_blocks` blocks, the page of (layer, position) starts at `(layer * slot_blocks + position) * page_bytes`.
"""

from __future__ import annotations

import msgspec

ALIGN_BYTES = 4096
CONTROL_BYTES = 4096  # fence words of attached workers, see CONTROL_FENCES
CONTROL_FENCES = CONTROL_BYTES // 8

# A block's header: u32 generation, u32 watermark of each shard (its leading layers filled), then per layer a u64
# xxh3-64 checksum, then per layer a 32-byte blake3 digest (zero unless digest mode is on).
HEADER_FIXED_BYTES = 64
SHARDS_MAX = HEADER_FIXED_BYTES // 4 - 1
CHECKSUM_BYTES = 8
DIGEST_BYTES = 32


class PageLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of one engine's KV: everything the store needs to know of it.

    With tensor parallelism every rank has its *shard* of a block: its own heads, in pages of its own. Shards lie in one
    slot, one after the other, and count as layers of it: layer l of shard s is layer s * shard_layers + l of the slot.
    """

    layers: int  # of all shards together
    page_bytes: int
    chunk_blocks: int  # blocks in a full chunk; a power of two
    shards: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= SHARDS_MAX or self.layers % self.shards:
            raise ValueError(
                f"there may be 1 to {SHARDS_MAX} shards, all of as many layers, not {self.shards} of {self.layers}"
            )
        if not 1 <= self.layers <= 1024:
            raise ValueError(f"layers must be 1..1024, not {self.layers}")
        if not 1 <= self.page_bytes <= 1 << 30:
            raise ValueError(f"page_bytes must be 1..2^30, not {self.page_bytes}")
        if not 1 <= self.chunk_blocks <= 1024 or self.chunk_blocks & (self.chunk_blocks - 1):
            raise ValueError(f"chunk_blocks must be a power of two up to 1024, not {self.chunk_blocks}")

    @property
    def shard_layers(self) -> int:
        return self.layers // self.shards

    def slot_layer(self, shard: int, layer: int) -> int:
        """What the slot counts as its layer, of this layer of a shard."""
        return shard * self.shard_layers + layer

    def shard_of_rank(self, rank: int) -> int:
        """KV that all ranks have alike is one shard."""
        return rank if self.shards > 1 else 0

    @property
    def block_bytes(self) -> int:
        return self.layers * self.page_bytes

    @property
    def unit_bytes(self) -> int:
        return round_up(self.block_bytes, ALIGN_BYTES)

    @property
    def header_bytes(self) -> int:
        return round_up(HEADER_FIXED_BYTES + self.layers * (CHECKSUM_BYTES + DIGEST_BYTES), 64)


class ExtentPlan(msgspec.Struct, frozen=True):
    """How an extent of `extent_bytes` is cut for one layout."""

    layout: PageLayout
    extent_bytes: int

    @property
    def units(self) -> int:
        """Blocks that fit, after the header area. 0 when the extent is too small for this layout."""
        count = self.extent_bytes // (self.layout.unit_bytes + self.layout.header_bytes)
        while count and self.header_area_bytes(count) + count * self.layout.unit_bytes > self.extent_bytes:
            count -= 1
        return count

    def header_area_bytes(self, units: int) -> int:
        return round_up(units * self.layout.header_bytes, ALIGN_BYTES)

    def unit_offset(self, extent_start: int, unit: int) -> int:
        return extent_start + self.header_area_bytes(self.units) + unit * self.layout.unit_bytes

    def header_offset(self, extent_start: int, unit: int) -> int:
        return extent_start + unit * self.layout.header_bytes


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where one block lives in an arena: relative to the arena's start, and valid for one generation only."""

    slot_offset: int
    slot_blocks: int
    position: int
    header_offset: int
    generation: int

    def page_offset(self, layout: PageLayout, layer: int) -> int:
        return self.slot_offset + (layer * self.slot_blocks + self.position) * layout.page_bytes

    def checksum_offset(self, layer: int) -> int:
        return self.header_offset + HEADER_FIXED_BYTES + layer * CHECKSUM_BYTES

    def digest_offset(self, layout: PageLayout, layer: int) -> int:
        return self.header_offset + HEADER_FIXED_BYTES + layout.layers * CHECKSUM_BYTES + layer * DIGEST_BYTES


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold `tokens` tokens, the unfull tail included."""
    return -(-tokens // block_tokens)


def slot_sizes(blocks: int, chunk_blocks: int) -> list[int]:
    """Cuts `blocks` consecutive blocks into slot sizes: full chunks, then the binary digits of the rest.

    >>> slot_sizes(7, 2)
    [2, 2, 2, 1]
    """
    sizes = [chunk_blocks] * (blocks // chunk_blocks)
    rest = blocks % chunk_blocks
    size = chunk_blocks // 2
    while rest:
        if rest >= size:
            sizes.append(size)
            rest -= size
        size //= 2
    return sizes
