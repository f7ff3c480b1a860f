"""Blocks of an arena through a tier and back, into places of other slots."""

from __future__ import annotations

import random

import pytest

from pdx.buffer.arena import Arena
from pdx.buffer.lease import Owner
from pdx.buffer.store import Store
from pdx.errors import BadBlock
from pdx.layout import CONTROL_BYTES, PageLayout, Place
from pdx.tiers.conformance import User
from pdx.tiers.memory import MemoryTier
from pdx.tiers.pages import meta_of, pages_of, restore
from pdx.tiers.tier import Loaded, Read, Write

LAYOUT = PageLayout(layers=3, page_bytes=1000, chunk_blocks=4)
OWNER = Owner(kind="session", name="engine")


def places(store: Store, name: bytes, count: int) -> tuple[Place, ...]:
    hashes = [name + bytes([index]) for index in range(count)]
    claim = store.claim(OWNER, b"n", LAYOUT, hashes, tail=False, now=0.0, ttl_s=10.0)
    assert claim is not None
    return claim.places


def test_blocks_come_back_with_their_checksums() -> None:
    rng = random.Random(3)
    with Arena.create(CONTROL_BYTES + (256 << 10), populate=False) as arena:
        store = Store(arena, extent_bytes=64 << 10, handoff_share=1.0)
        tier = MemoryTier(cap_bytes=1 << 20)
        user = User(tier)
        sources, targets = places(store, b"a", 7), places(store, b"b", 7)[::-1]  # 4 + 2 + 1, so shapes differ
        for index, place in enumerate(sources):
            for layer in range(LAYOUT.layers):
                start = place.page_offset(LAYOUT, layer)
                arena.memory[start : start + LAYOUT.page_bytes] = rng.randbytes(LAYOUT.page_bytes)
                arena.set_checksum(place, layer, rng.getrandbits(64))
                arena.set_digest(place, LAYOUT, layer, rng.randbytes(32))
            meta = meta_of(arena, place, LAYOUT)
            user.end_of(user.ask(Write((b"n", bytes([index])), pages_of(arena, place, LAYOUT), meta)))
        for index, place in enumerate(targets):
            end = user.end_of(user.ask(Read((b"n", bytes([index])), pages_of(arena, place, LAYOUT))))
            assert isinstance(end, Loaded)
            generation = arena.generation(place.header_offset)
            restore(arena, place, LAYOUT, end.meta)
            assert arena.watermark(place.header_offset) == LAYOUT.layers
            assert arena.generation(place.header_offset) == generation
        for source, target in zip(sources, targets, strict=True):
            assert b"".join(pages_of(arena, source, LAYOUT)) == b"".join(pages_of(arena, target, LAYOUT))
            for layer in range(LAYOUT.layers):
                assert arena.checksum(source, layer) == arena.checksum(target, layer)
                assert arena.digest(source, LAYOUT, layer) == arena.digest(target, LAYOUT, layer)
        user.ends.clear()
        tier.close(drain_s=0.0)
        del user


def test_another_layout_is_refused() -> None:
    with Arena.create(CONTROL_BYTES + (256 << 10), populate=False) as arena:
        store = Store(arena, extent_bytes=64 << 10, handoff_share=1.0)
        (place,) = places(store, b"a", 1)
        meta = meta_of(arena, place, LAYOUT)
        for bad in (b"", meta[:-1], meta + b"x", meta_of(arena, place, PageLayout(3, 500, 4))):
            with pytest.raises(BadBlock):
                restore(arena, place, LAYOUT, bad)
        assert arena.watermark(place.header_offset) == 0


def test_every_shard_of_a_block_that_comes_back_is_whole() -> None:
    sharded = PageLayout(layers=6, page_bytes=1000, chunk_blocks=1, shards=3)
    with Arena.create(CONTROL_BYTES + (256 << 10), populate=False) as arena:
        store = Store(arena, extent_bytes=64 << 10, handoff_share=1.0)
        claim = store.claim(OWNER, b"n", sharded, [b"a"], tail=False, now=0.0, ttl_s=10.0)
        assert claim is not None
        (place,) = claim.places
        restore(arena, place, sharded, meta_of(arena, place, sharded))
        assert [arena.watermark(place.header_offset, shard) for shard in range(4)] == [2, 2, 2, 0]
