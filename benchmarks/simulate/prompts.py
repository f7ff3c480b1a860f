"""Prompts, and what their KV is: bytes that are a function of the tokens, by which each page is told from others."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import xxhash

from pdx.keys import tail_hash
from pdx.layout import PageLayout

BLOCK_TOKENS = 4
# 64 bytes a page and 2 layers: small enough for a million handoffs, and still a block has more than one of each.
PAGES = PageLayout(layers=2, page_bytes=64, chunk_blocks=4)
MODEL = "m"
END = 0  # the token with which an answer ends
_PAGE_NAMES_KEPT = 4096
_PROMPTS_KEPT = 1024


class Prompt:
    """What an engine derives of token ids. `names[i]` stands for all tokens up to the end of block i."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self.block_hashes: list[bytes] = []
        previous = b""
        for start in range(0, len(tokens) - len(tokens) % BLOCK_TOKENS, BLOCK_TOKENS):
            block = bytes(tokens[start : start + BLOCK_TOKENS])
            previous = hashlib.blake2b(previous + block, digest_size=16).digest()
            self.block_hashes.append(previous)
        rest = tokens[len(self.block_hashes) * BLOCK_TOKENS :]
        self.tail_hash = tail_hash(previous, list(rest))
        self.names = [*self.block_hashes, self.tail_hash] if rest else list(self.block_hashes)

    @property
    def blocks(self) -> int:
        return len(self.names)


@lru_cache(maxsize=_PROMPTS_KEPT)
def prompt_of(tokens: tuple[int, ...]) -> Prompt:
    return Prompt(tokens)


@lru_cache(maxsize=_PAGE_NAMES_KEPT)
def pages_of(name: bytes) -> tuple[tuple[bytes, int], ...]:
    """The right page and its checksum, by layer."""
    size = PAGES.page_bytes
    pages = [hashlib.blake2b(name + bytes([layer]), digest_size=size).digest() for layer in range(PAGES.layers)]
    return tuple((page, xxhash.xxh3_64_intdigest(page)) for page in pages)


def answer_of(tokens: Sequence[int], count: int) -> list[int]:
    """What a model says to a prompt: token by token, each a function of all before it, until it says END."""
    said = list(tokens)
    while len(said) < len(tokens) + count:
        said.append(xxhash.xxh3_64_intdigest(bytes(said)) & 0xFF)
        if said[-1] == END:
            break
    return said[len(tokens) :]


def text_of(said: Sequence[int]) -> str:
    return "".join(f"{token:02x}" for token in said if token != END)


def body_of(name: str, tokens: Sequence[int], said: Sequence[int], *, handed_over: str = "") -> bytes:
    """A whole answer, in vLLM's shape as far as the router reads it, and with what our connector adds."""
    choice = {
        "index": 0, "text": text_of(said), "logprobs": None, "finish_reason": _finish(said), "stop_reason": None,
        "token_ids": list(said), "prompt_token_ids": list(tokens),
    }  # fmt: skip
    usage = {"prompt_tokens": len(tokens), "completion_tokens": len(said), "total_tokens": len(tokens) + len(said)}
    head = {"id": name, "object": "text_completion", "created": 1, "model": MODEL}
    added = {"pdx": {"handoff": handed_over}} if handed_over else None
    return msgspec.json.encode({**head, "choices": [choice], "usage": usage, "kv_transfer_params": added})


def chunk_of(name: str, said: Sequence[int], *, last: bool = False) -> bytes:
    """One event of a stream; the last comes with the end of it."""
    choice = {"index": 0, "text": text_of(said), "logprobs": None, "finish_reason": _finish(said) if last else None}
    head = {"id": name, "object": "text_completion", "created": 2, "model": MODEL}
    event = b"data: " + msgspec.json.encode({**head, "choices": [choice]}) + b"\n\n"
    return event + b"data: [DONE]\n\n" if last else event


def _finish(said: Sequence[int]) -> str:
    return "stop" if said[-1] == END else "length"


class Talk:
    """Chats that share beginnings, and new ones. The tails of different chats are often the same few tokens."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._beginnings = [self._new(chance.randint(1, 4) * BLOCK_TOKENS) for _ in range(4)]

    def next_prompt(self) -> tuple[int, ...]:
        chance = self._chance
        way = chance.random()
        if way < 0.5:
            tokens = chance.choice(self._beginnings) + self._new(chance.randint(0, 4) * BLOCK_TOKENS)
        else:
            tokens = self._new(chance.randint(1, 8) * BLOCK_TOKENS)
        if chance.random() < 0.2:
            self._beginnings[chance.randrange(len(self._beginnings))] = tokens[: 4 * BLOCK_TOKENS]
        return tokens + (1, 2, 3)[: chance.randint(0, 3)]  # a common tail, behind whatever came before it

    def answered(self, tokens: Sequence[int], said: Sequence[int]) -> None:
        """Some chats go on from what was said."""
        if self._chance.random() < 0.3:
            chat = (*tokens, *said)[: 6 * BLOCK_TOKENS]
            self._beginnings[self._chance.randrange(len(self._beginnings))] = chat

    def _new(self, count: int) -> tuple[int, ...]:
        return tuple(self._chance.choices(range(1, 256), k=count))
