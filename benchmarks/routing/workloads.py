"""What is asked: sessions of turns, in blocks. A block is a number, from which its tokens follow."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK_TOKENS = 64  # larger than real ones, so that a run has fewer
TTFT_P95_S = 2.0  # the limit at which throughputs are compared

_NUMBER_BITS, _TOKEN_BITS = 32, 16


@dataclass(frozen=True)
class Turn:
    """One request: its prompt's blocks, those that its answer makes whole, and when the next turn follows."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    think_s: float


Sessions = Iterator[list[Turn]]


@dataclass(frozen=True)
class Workload:
    sessions: Callable[[random.Random], Sessions]
    turns: int  # of each session
    rate: float  # requests a second from which searches begin: about round robin's throughput
    least: float  # times round robin's throughput


def chats(rng: random.Random) -> Sessions:
    """Six turns of a document of 2,000 tokens and questions about it; people read for some seconds."""
    for number in itertools.count():
        prompt = blocks(f"document {number}", 32)
        turns = []
        for turn in range(6):
            prompt += blocks(f"question {number} {turn}", 3)
            answer = answer_to(prompt[-1], 3)
            turns.append(Turn(tuple(prompt), tuple(answer), rng.uniform(1.0, 5.0)))
            prompt = [*prompt, *answer]
        yield turns


def shared(rng: random.Random) -> Sessions:
    """One question each, behind one of 256 prompts of 4,000 tokens, some of which many use: a host has room for 150."""
    prompts = [blocks(f"system {number}", 64) for number in range(256)]
    weights = [1 / (rank + 1) ** 0.7 for rank in range(len(prompts))]
    for number in itertools.count():
        (system,) = rng.choices(prompts, weights)
        prompt = system + blocks(f"question {number}", 8)
        yield [Turn(tuple(prompt), tuple(answer_to(prompt[-1], 2)), 0.0)]


def unlike(rng: random.Random) -> Sessions:
    """Nothing comes twice; lengths differ by ten."""
    for number in itertools.count():
        prompt = blocks(f"prompt {number}", rng.choice((6, 12, 30, 60)))
        yield [Turn(tuple(prompt), tuple(answer_to(prompt[-1], 2)), 0.0)]


WORKLOADS = {
    "chats": Workload(chats, 6, 20.0, 1.8),
    "shared prefixes": Workload(shared, 1, 14.0, 1.8),
    "zero reuse": Workload(unlike, 1, 30.0, 0.95),
}


def blocks(what: str, count: int) -> list[int]:
    rng = random.Random(what)
    return [rng.getrandbits(_NUMBER_BITS) for _ in range(count)]


def answer_to(last: int, count: int) -> list[int]:
    """What an engine says to a prompt that ends in this block: client and engine know it without being told."""
    return blocks(f"answer {last}", count)


def tokens_of(block: int) -> list[int]:
    return [block >> _TOKEN_BITS, block & ((1 << _TOKEN_BITS) - 1), *[7] * (BLOCK_TOKENS - 2)]


def block_of(tokens: list[int]) -> int:
    """The block that begins with these tokens."""
    return tokens[0] << _TOKEN_BITS | tokens[1]
