"""A block as a file describes it: header, then payload. Works on bytes; knows no files.

    header   magic 8 | seal 32 | version u16, kind u16, header bytes u32, payload bytes u64 | payload digest 32
             | lengths of namespace, hash (u8) and meta (u32) | namespace | hash | meta | zeros up to 4 KiB
    payload  the pages, one after the other | zeros up to 4 KiB

The digest covers the payload, the seal covers the header and through it everything. Without a key they find rot
(xxh3-128, blake3). With a key both are keyed blake3, so that nobody who can write to the disk can make up a block.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
import struct
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import xxhash
from blake3 import blake3

from pdx.errors import BadBlock
from pdx.keys import SHORT_NAME_BYTES, block_digests, split_namespace
from pdx.layout import ALIGN_BYTES, round_up
from pdx.tiers.tier import KEY_PART_BYTES_MAX, META_BYTES_MAX, Key

MAGIC = b"pdxblock"
VERSION = 1
KEY_BYTES = 32
HEADER_BYTES_MAX = 64 << 10
NAME_LENGTH = 64
_DIGEST_START = 32  # behind two labels
_NAME = re.compile(f"[0-9a-f]{{{NAME_LENGTH}}}")

_SEAL_BYTES = 32
_FIXED = struct.Struct("<HHIQ32sBBI")
_FIXED_START = len(MAGIC) + _SEAL_BYTES
_NAMES_START = _FIXED_START + _FIXED.size
_PLAIN, _KEYED = 0, 1


def name_of(key: Key) -> str:
    """A file name of fixed length, whatever the key. It begins with labels of the key's space and tenant."""
    (name,) = names_of([key])
    return name


def names_of(keys: Iterable[Key]) -> list[str]:
    """The same of many, for less where their namespace is one."""
    names: list[str] = []
    for namespace, group in groupby(keys, key=itemgetter(0)):
        space, tenant = split_namespace(namespace)
        labels = label_of(space) + label_of(tenant)
        names += [labels + digest.hex() for digest in block_digests(namespace, [key[1] for key in group])]
    return names


@functools.lru_cache(maxsize=1024)
def label_of(part: bytes) -> str:
    """What a file name says of a space or a tenant: enough to find all of its blocks again without opening one."""
    return hashlib.blake2b(part, digest_size=8, person=b"pdx-label").hexdigest()


def labels_of(name: str) -> tuple[str, str]:
    """Of the space and of the tenant."""
    return name[:16], name[16:32]


def is_name(text: str) -> bool:
    """Whether `name_of` could have made it."""
    return _NAME.fullmatch(text) is not None


def short_name_of(name: str) -> int:
    """keys.short_names' name of the block in the file of this name."""
    return int(name[_DIGEST_START : _DIGEST_START + 2 * SHORT_NAME_BYTES], 16)


def check_sizes(key: Key, meta: bytes, payload_bytes: int) -> None:
    """Raises ValueError for what no header can describe."""
    if max(map(len, key)) > KEY_PART_BYTES_MAX:
        raise ValueError(f"a key's parts have at most {KEY_PART_BYTES_MAX} bytes, not {max(map(len, key))}")
    if len(meta) > META_BYTES_MAX:
        raise ValueError(f"meta has at most {META_BYTES_MAX} bytes, not {len(meta)}")
    if payload_bytes < 1:
        raise ValueError("a block without bytes can't be kept")


def header_bytes(key: Key, meta: bytes) -> int:
    return round_up(_NAMES_START + len(key[0]) + len(key[1]) + len(meta), ALIGN_BYTES)


def file_bytes(key: Key, meta: bytes, payload_bytes: int) -> int:
    return header_bytes(key, meta) + round_up(payload_bytes, ALIGN_BYTES)


class Sealer:
    """Makes headers and checks blocks against them. `secret`: KEY_BYTES bytes that only we know, or None."""

    def __init__(self, secret: bytes | None) -> None:
        if secret is not None and len(secret) != KEY_BYTES:
            raise ValueError(f"a tier's secret has {KEY_BYTES} bytes, not {len(secret)}")
        self._kind = _PLAIN if secret is None else _KEYED
        # The secret has other uses elsewhere, and two here: none must be good for another.
        self._seal_key = secret and blake3(secret, derive_key_context="pdx disk tier, seal of a header").digest()
        self._digest_key = secret and blake3(secret, derive_key_context="pdx disk tier, digest of pages").digest()

    def seal(self, key: Key, pages: Sequence[memoryview], meta: bytes) -> bytes:
        """The header of a block, of `header_bytes` bytes. Reads all of the payload."""
        namespace, block_hash = key
        size_bytes = header_bytes(key, meta)
        payload_bytes = sum(page.nbytes for page in pages)
        lengths = len(namespace), len(block_hash), len(meta)
        fixed = _FIXED.pack(VERSION, self._kind, size_bytes, payload_bytes, self._digest(pages), *lengths)
        body = (fixed + namespace + block_hash + meta).ljust(size_bytes - _FIXED_START, b"\0")
        return MAGIC + self._seal(body) + body

    def unseal(self, header: bytes, key: Key, pages: Sequence[memoryview]) -> bytes:
        """The meta of this very block, whose payload `pages` now hold. Raises BadBlock if anything at all is wrong."""
        if header[: len(MAGIC)] != MAGIC:
            raise BadBlock("no block of ours")
        body = header[_FIXED_START:]
        if not hmac.compare_digest(header[len(MAGIC) : _FIXED_START], self._seal(body)):
            raise BadBlock("its header does not match its seal")
        version, kind, size_bytes, payload_bytes, digest, *lengths = _FIXED.unpack_from(body)
        if version != VERSION or kind != self._kind:
            raise BadBlock(f"its version is {version}, of kind {kind}")
        if size_bytes != len(header) or payload_bytes != sum(page.nbytes for page in pages):
            raise BadBlock(f"its payload has {payload_bytes} bytes")
        parts = []
        start = _FIXED.size
        for length in lengths:
            parts.append(body[start : start + length])
            start += length
        namespace, block_hash, meta = parts
        if (namespace, block_hash) != key:
            raise BadBlock("it is another block")
        if not hmac.compare_digest(digest, self._digest(pages)):
            raise BadBlock("its payload does not match its digest")
        return meta

    def _seal(self, body: bytes) -> bytes:
        return (blake3(body, key=self._seal_key) if self._seal_key else blake3(body)).digest()

    def _digest(self, pages: Sequence[memoryview]) -> bytes:
        hasher = blake3(key=self._digest_key) if self._digest_key else xxhash.xxh3_128()
        for page in pages:
            hasher.update(page)
        return hasher.digest().ljust(32, b"\0")
