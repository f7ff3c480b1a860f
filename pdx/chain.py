"""vLLM's own names of a prompt's blocks, from its tokens alone. Pure; imports no engine. New vLLM: read it again.

vLLM names a full block by digest(CBOR((name of the block before, its tokens, extra keys))), and the first block has the
digest of a seed before it. Among the extra keys is the request's cache_salt, in the first block only: it goes into the
names of all that follow, so that whoever does not know a salt can't name its blocks. Adapters and images have keys too,
which nobody can tell from tokens: prompts with such are not named here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import xxhash

from pdx.errors import Refused
from pdx.keys import ContentFingerprint

TOKENS_MAX = 1 << 20  # of one prompt: half a second of hashing
TOKEN_MAX = (1 << 32) - 1
VOCABULARY_MAX = 1 << 18  # tokens whose encoding is remembered

_DIGESTS: dict[str, Callable[[bytes], bytes]] = {
    "sha256_cbor": lambda data: hashlib.sha256(data).digest(),
    "xxhash_cbor": xxhash.xxh3_128_digest,
}
_UINT, _BYTES, _TEXT, _ARRAY = 0, 2, 3, 4
_NULL = b"\xf6"


def block_hashes(content: ContentFingerprint, tokens: Sequence[int], *, salt: str = "") -> list[bytes]:
    """The names of the full blocks, in order; empty for a prompt shorter than one block.

    Raises Refused for engines whose names depend on more than that, and for what are no tokens.
    """
    algorithm, _, seed = content.hash_algorithm.partition("/")
    digest = _DIGESTS.get(algorithm)
    if digest is None:
        raise Refused(
            f"block hashes of {algorithm!r} can't be told from tokens: start engines with "
            "--prefix-caching-hash-algo sha256_cbor"
        )
    if len(tokens) > TOKENS_MAX:
        raise Refused(f"{len(tokens)} tokens are more than {TOKENS_MAX}")
    extra = _array([_array([_text("cache_salt"), _text(salt)])]) if salt else _NULL
    parent, size = digest(_text(seed)), content.block_tokens
    # A router does this for every prompt: what is the same in all blocks is written once.
    before, between = _head(_ARRAY, 3) + _head(_BYTES, len(parent)), _head(_ARRAY, size)
    encoded = list(map(_encoded_tokens.__getitem__, tokens))
    names = []
    for start in range(0, len(tokens) - size + 1, size):
        parent = digest(before + parent + between + b"".join(encoded[start : start + size]) + extra)
        names.append(parent)
        extra = _NULL
    return names


def _head(kind: int, value: int) -> bytes:
    """CBOR's first bytes of an item: its kind, and its value or length in as few bytes as hold it."""
    if value < 24:
        return bytes(((kind << 5) | value,))
    size_code, size_bytes = next((code, 1 << n) for n, code in enumerate((24, 25, 26)) if value >> (8 << n) == 0)
    return bytes(((kind << 5) | size_code,)) + value.to_bytes(size_bytes, "big")


class _EncodedTokens(dict[int, bytes]):
    """A vocabulary: most of a long prompt's time went into this. Of any thread."""

    def __missing__(self, token: int) -> bytes:
        if not 0 <= token <= TOKEN_MAX:
            raise Refused(f"a token is a number from 0 to {TOKEN_MAX}")
        if len(self) >= VOCABULARY_MAX:
            self.clear()
        self[token] = encoded = _head(_UINT, token)
        return encoded


_encoded_tokens = _EncodedTokens()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _head(_TEXT, len(encoded)) + encoded


def _array(items: Sequence[bytes]) -> bytes:
    return _head(_ARRAY, len(items)) + b"".join(items)
