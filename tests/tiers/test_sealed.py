from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdx.errors import BadBlock
from pdx.layout import ALIGN_BYTES
from pdx.tiers import sealed

PARTS = st.binary(max_size=255)
SECRETS = st.sampled_from([None, bytes(32), b"k" * 32])
KEY = (b"namespace", b"block hash")
PAGES = [memoryview(b"first page"), memoryview(b"second")]


@given(key=st.tuples(PARTS, PARTS), meta=st.binary(max_size=9000), payload=st.binary(min_size=1), secret=SECRETS)
def test_a_header_gives_back_what_it_was_made_of(
    key: tuple[bytes, bytes], meta: bytes, payload: bytes, secret: bytes | None
) -> None:
    header = sealed.Sealer(secret).seal(key, [memoryview(payload)], meta)
    assert len(header) % ALIGN_BYTES == 0
    assert len(header) == sealed.header_bytes(key, meta) <= sealed.HEADER_BYTES_MAX
    middle = len(payload) // 2
    assert (
        sealed.Sealer(secret).unseal(header, key, [memoryview(payload[:middle]), memoryview(payload[middle:])]) == meta
    )


def test_every_flipped_byte_of_a_header_is_found() -> None:
    for secret in (None, bytes(32)):
        header = sealed.Sealer(secret).seal(KEY, PAGES, b"meta")
        for position in range(len(header)):
            bad = bytearray(header)
            bad[position] ^= 0x10
            with pytest.raises(BadBlock):
                sealed.Sealer(secret).unseal(bytes(bad), KEY, PAGES)


@pytest.mark.parametrize(
    ("key", "pages", "secret"),
    [
        ((b"namespace", b"other"), PAGES, None),
        ((b"namespaceblock", b" hash"), PAGES, None),
        (KEY, PAGES[:1], None),
        (KEY, PAGES[::-1], None),
        (KEY, PAGES, bytes(32)),
    ],
)
def test_another_block_is_found_out(key: tuple[bytes, bytes], pages: list[memoryview], secret: bytes | None) -> None:
    header = sealed.Sealer(None).seal(KEY, PAGES, b"meta")
    with pytest.raises(BadBlock):
        sealed.Sealer(secret).unseal(header, key, pages)


def test_nobody_without_the_secret_makes_a_block() -> None:
    for forger in (None, b"x" * 32):
        header = sealed.Sealer(forger).seal(KEY, PAGES, b"meta")
        with pytest.raises(BadBlock):
            sealed.Sealer(bytes(32)).unseal(header, KEY, PAGES)


def test_names_have_one_length_and_tell_keys_apart() -> None:
    keys = [(b"", b""), (b"a", b"b"), (b"ab", b""), (b"", b"ab"), (b"x" * 255, b"y" * 255)]
    names = {sealed.name_of(key) for key in keys}
    assert len(names) == len(keys)
    assert {len(name) for name in names} == {sealed.NAME_LENGTH}


def test_a_secret_has_one_length() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 5"):
        sealed.Sealer(b"short")
