from __future__ import annotations

import struct

import pytest

from pdx.buffer.headers import Headers
from pdx.layout import CONTROL_BYTES, SHARDS_MAX, PageLayout, Place

PAGES = PageLayout(layers=5, page_bytes=64, chunk_blocks=2)
PLACE = Place(slot_offset=8192, slot_blocks=1, position=0, header_offset=CONTROL_BYTES, generation=77)


def headers_full_of(byte: int) -> Headers:
    return Headers(memoryview(bytearray([byte]) * 16384))


def test_words_lie_where_the_layout_says() -> None:
    headers = headers_full_of(0)
    headers.reset(PLACE.header_offset, PAGES, 77)
    headers.set_watermark(PLACE.header_offset, 3)
    headers.set_checksum(PLACE, 4, 2**64 - 2)
    headers.set_digest(PLACE, PAGES, 4, b"d" * 32)
    assert struct.unpack_from("<II", headers.memory, PLACE.header_offset) == (77, 3)
    assert struct.unpack_from("<Q", headers.memory, PLACE.checksum_offset(4)) == (2**64 - 2,)
    start = PLACE.digest_offset(PAGES, 4)
    assert bytes(headers.memory[start : start + 32]) == b"d" * 32
    assert (headers.generation(PLACE.header_offset), headers.watermark(PLACE.header_offset)) == (77, 3)
    assert (headers.checksum(PLACE, 4), headers.digest(PLACE, PAGES, 4)) == (2**64 - 2, b"d" * 32)


def test_every_shard_has_a_watermark_within_the_fixed_header() -> None:
    headers = headers_full_of(0xFF)
    headers.reset(PLACE.header_offset, PAGES, 77)
    for shard in range(SHARDS_MAX):
        headers.set_watermark(PLACE.header_offset, shard + 1, shard)
    assert [headers.watermark(PLACE.header_offset, shard) for shard in range(SHARDS_MAX)] == list(range(1, 16))
    assert (headers.generation(PLACE.header_offset), headers.checksum(PLACE, 0)) == (77, 0)


def test_reset_clears_exactly_one_header() -> None:
    headers = headers_full_of(0xFF)
    headers.reset(PLACE.header_offset, PAGES, 78)
    end = PLACE.header_offset + PAGES.header_bytes
    assert bytes(headers.memory[PLACE.header_offset : end]) == struct.pack("<I", 78) + bytes(PAGES.header_bytes - 4)
    assert headers.memory[PLACE.header_offset - 1] == headers.memory[end] == 0xFF


def test_the_largest_generation_fits() -> None:
    headers = headers_full_of(0)
    headers.reset(PLACE.header_offset, PAGES, 2**32 - 1)
    assert headers.generation(PLACE.header_offset) == 2**32 - 1
    assert headers.watermark(PLACE.header_offset) == 0


def test_digests_have_one_length() -> None:
    with pytest.raises(ValueError, match="structure"):
        headers_full_of(0).set_digest(PLACE, PAGES, 0, b"short")


def test_fences_are_independent_words_of_the_control_page() -> None:
    headers = headers_full_of(0)
    headers.set_fence(0, 5)
    headers.set_fence(CONTROL_BYTES - 8, 2**40)
    assert (headers.fence(0), headers.fence(8), headers.fence(CONTROL_BYTES - 8)) == (5, 0, 2**40)
    for offset in (-8, 4, CONTROL_BYTES):
        with pytest.raises(ValueError, match="no fence word"):
            headers.set_fence(offset, 1)
