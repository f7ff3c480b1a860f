"""Names for content: namespaces, block keys and identifiers. Pure functions on bytes.

A block's key is (namespace, block hash). The namespace is a *space*, which digests the content and the layout
fingerprint, so that two models, dtypes, block sizes or weight epochs can never meet under one key; and behind it the
tenant, so that nobody finds what is another's. Block hashes are the engine's own: opaque bytes here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

NAMESPACE_BYTES = 16
SPACE_BYTES = 24
TENANT_BYTES = 16
SHORT_NAME_BYTES = 8

AtLeastOne = Annotated[int, Meta(ge=1, le=1 << 32)]  # of what there is at least one; products of two fit into 64 bits


class ContentFingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bytes of a block mean, wherever they were computed. Part of every key."""

    model: str  # the engine's model name: for people; `weights` is what tells two models apart
    weights: str  # hex digest of the weight files' names, sizes and headers, and of config overrides
    weight_epoch: str  # "": the weights of these files; else, after an update, a digest of the live ones
    dtype: str
    block_tokens: AtLeastOne
    hash_algorithm: str  # with its seed, e.g. "sha256_cbor/vllm-none-hash"


class LayoutFingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a block lies in memory. Compared between the two sides of every pair: match, or do not pair."""

    engine: str  # "vllm 0.32.0"
    attention: str  # kernel family and ISA, e.g. "CPU_ATTN/vec"
    layers: AtLeastOne
    page_bytes: AtLeastOne
    block_tokens: AtLeastOne
    packing: str  # physical order of one page, e.g. "LBHNC K|V 3x64 bfloat16"
    kv_groups: AtLeastOne
    ranks: AtLeastOne  # among which its heads are split (tensor parallelism); a page is one rank's
    chunk_blocks: AtLeastOne  # of one slot of the arena, which both sides of a handoff address alike


def namespace_of(content: ContentFingerprint) -> bytes:
    """A 16-byte name of this content."""
    return _digest(content)[:NAMESPACE_BYTES]


def layout_id(layout: LayoutFingerprint) -> str:
    """A short hex name of a layout, for comparison and logs."""
    return _digest(layout).hex()[:16]


def space_of(content: ContentFingerprint, layout: LayoutFingerprint) -> bytes:
    """Same content *and* same layout: blocks of one space can stand for each other."""
    return namespace_of(content) + bytes.fromhex(layout_id(layout))


def tenant_of(salt: str) -> bytes:
    """A tenant's name, made from the `cache_salt` of its requests, which stays with it. Empty: who has none."""
    if not salt:
        return b""
    return hashlib.blake2b(salt.encode(), digest_size=TENANT_BYTES, person=b"pdx-tenant").digest()


def block_digests(namespace: bytes, block_hashes: Iterable[bytes]) -> list[bytes]:
    """16 bytes each: names of blocks where nobody needs to know what of. Whoever has no namespace can't make them."""
    base = hashlib.blake2b(digest_size=16, person=b"pdx-block-name")
    base.update(len(namespace).to_bytes(2, "little") + namespace)
    digests = []
    for block_hash in block_hashes:
        digest = base.copy()
        digest.update(block_hash)
        digests.append(digest.digest())
    return digests


def short_names(namespace: bytes, block_hashes: Iterable[bytes]) -> list[int]:
    """As routers know blocks: the first eight bytes of their digests. Two may share one: good for hints only."""
    digests = block_digests(namespace, block_hashes)
    return list(struct.unpack(">" + "Q8x" * len(digests), b"".join(digests)))


def admin_token(cluster_key: bytes) -> str:
    """What opens the router's admin port to who knows the cluster key, and does not tell the key."""
    return hashlib.blake2b(cluster_key, digest_size=32, person=b"pdx-admin").hexdigest()


def split_namespace(namespace: bytes) -> tuple[bytes, bytes]:
    """Space and tenant of a key's namespace."""
    return namespace[:SPACE_BYTES], namespace[SPACE_BYTES:]


def _digest(value: msgspec.Struct) -> bytes:
    canonical = msgspec.json.encode(value, order="deterministic")
    return hashlib.blake2b(canonical, digest_size=32, person=b"pdx-fingerprint").digest()


def salted(block_hash: bytes, salt: bytes) -> bytes:
    """The block's name where its hash does not name all that went into it; `salt` is a digest of the rest, or empty."""
    return hashlib.blake2b(block_hash, digest_size=32, salt=salt, person=b"pdx-salted").digest() if salt else block_hash


def private_salt(handoff_id: bytes, salt: bytes) -> bytes:
    """Makes names that mean blocks of this handoff alone, whatever `salt` says besides."""
    return hashlib.blake2b(handoff_id + salt, digest_size=16, person=b"pdx-private").digest()


def tail_hash(previous_block_hash: bytes, tokens: list[int]) -> bytes:
    """Names an unfull last block: its predecessor's hash and its tokens. Empty when there are no tail tokens.

    Tails are never indexed; both engines compute this so that a tail is used only for the very same prompt.
    """
    if not tokens:
        return b""
    packed = b"".join(token.to_bytes(8, "little") for token in tokens)
    return hashlib.blake2b(previous_block_hash + packed, digest_size=32, person=b"pdx-tail").digest()
