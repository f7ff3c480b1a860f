"""Names of blocks from tokens: those of vLLM's own functions, and refusals by name."""

from __future__ import annotations

import random

import msgspec
import pytest

from pdx import chain
from pdx.errors import Refused
from pdx.keys import ContentFingerprint

SEED = "vllm-none-hash"
CONTENT = ContentFingerprint(
    model="m", weights="w", weight_epoch="", dtype="bf16", block_tokens=16, hash_algorithm=f"sha256_cbor/{SEED}"
)
# Every length that CBOR's heads have, and both sides of where they change.
TOKENS = [0, 1, 23, 24, 255, 256, 65_535, 65_536, chain.TOKEN_MAX]


def content(**changed: object) -> ContentFingerprint:
    return msgspec.structs.replace(CONTENT, **changed)


@pytest.mark.vllm
@pytest.mark.parametrize("algorithm", ["sha256_cbor", "xxhash_cbor"])
@pytest.mark.parametrize("salt", ["", "tenant-a", "ü" * 300])
@pytest.mark.parametrize("block_tokens", [1, 16, 128, 300])
def test_names_are_vllms(algorithm: str, salt: str, block_tokens: int) -> None:
    from vllm.utils.hashing import get_hash_fn_by_name

    digest = get_hash_fn_by_name(algorithm)
    chance = random.Random(block_tokens)
    tokens = [*TOKENS, *(chance.randrange(200_000) for _ in range(3 * block_tokens + 5))]
    extra, parent, expected = (("cache_salt", salt),) if salt else None, digest(SEED), []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = digest((parent, tuple(tokens[start : start + block_tokens]), extra if start == 0 else None))
        expected.append(parent)
    named = chain.block_hashes(
        content(block_tokens=block_tokens, hash_algorithm=f"{algorithm}/{SEED}"), tokens, salt=salt
    )
    assert named == expected


@pytest.mark.vllm
def test_names_are_those_of_a_request() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256_cbor)
    tokens = list(range(100, 150))
    for salt in (None, "tenant-a"):
        request = Request(
            request_id="r", prompt_token_ids=tokens, sampling_params=SamplingParams(), pooling_params=None,
            cache_salt=salt, block_hasher=get_request_block_hasher(16, sha256_cbor),
        )  # fmt: skip
        assert chain.block_hashes(CONTENT, tokens, salt=salt or "") == [bytes(name) for name in request.block_hashes]


def test_salt_and_seed_and_every_token_change_all_names_behind_them() -> None:
    tokens = list(range(64))
    plain = chain.block_hashes(CONTENT, tokens)
    assert len(plain) == len(set(plain)) == 4
    assert not set(plain) & set(chain.block_hashes(CONTENT, tokens, salt="a"))
    assert not set(plain) & set(chain.block_hashes(content(hash_algorithm="sha256_cbor/other"), tokens))
    changed = chain.block_hashes(CONTENT, [*tokens[:20], 7, *tokens[21:]])
    assert [one == other for one, other in zip(plain, changed, strict=True)] == [True, False, False, False]


def test_only_full_blocks_have_names() -> None:
    assert chain.block_hashes(CONTENT, []) == []
    assert chain.block_hashes(CONTENT, [1] * 15) == []
    assert len(chain.block_hashes(CONTENT, [1] * 33)) == 2


@pytest.mark.parametrize(
    ("changed", "tokens", "complaint"),
    [
        ({"hash_algorithm": "sha256/seed"}, [1], "--prefix-caching-hash-algo sha256_cbor"),
        ({}, [-1], "from 0 to"),
        ({}, [chain.TOKEN_MAX + 1], "from 0 to"),
        ({}, [1] * (chain.TOKENS_MAX + 1), "more than"),
    ],
)
def test_what_can_not_be_named_is_refused(changed: dict[str, str], tokens: list[int], complaint: str) -> None:
    with pytest.raises(Refused, match=complaint):
        chain.block_hashes(content(**changed), tokens)
