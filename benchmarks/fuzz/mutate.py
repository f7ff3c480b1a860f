"""Frames that are almost right: bytes after an accident, and values with one part of another kind.

Knows MessagePack and JSON, and nothing of what they say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
# Nil, never used, false, true, the longest kinds of bytes, extensions, floats, integers, strings, arrays and maps.
MARKERS = bytes((*range(0xC0, 0xE0), 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xFF))
SCRAPS = (
    b"{}", b"[]", b"null", b"-1", b"1e999", b"NaN", b'""', b'"\\ud800"', b"[" * 2000, b'{"a":' * 500,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff", b"\x91" * 3000, b"\xff\xfe",
)  # fmt: skip


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A seed after one to four accidents; now and then bytes without any sense."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(64))
    frame = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        _strike(rng, frame, seeds)
    return bytes(frame)


def _strike(rng: random.Random, frame: bytearray, seeds: Sequence[bytes]) -> None:
    at = rng.randrange(len(frame) + 1)
    match rng.randrange(8):
        case 0 if frame:
            frame[at - 1] ^= 1 << rng.randrange(8)
        case 1 if frame:
            frame[at - 1] = rng.choice(MARKERS)
        case 2:
            del frame[at : at + rng.randrange(1, 9)]
        case 3:
            frame[at:at] = rng.choice(SCRAPS)
        case 4:
            number = rng.choice(NUMBERS).to_bytes(8, rng.choice(("little", "big")))
            frame[at : at + rng.choice((1, 2, 4, 8))] = number
        case 5:
            other = rng.choice(seeds)
            frame[at:] = other[rng.randrange(len(other) + 1) :]
        case 6:
            start = rng.randrange(len(frame) + 1)
            frame[at:at] = frame[start : start + rng.randrange(40)]
        case _:
            frame[at : at + 1] = rng.randbytes(rng.randrange(4))


SCALARS: tuple[Any, ...] = (None, True, -1, 0, 1, 1.5, (1 << 63) - 1, (1 << 64) - 1, "", "x", "length", "\ufffd")
DEEP = 800  # what JSON's decoder still takes


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


SHAPES: tuple[Any, ...] = ([], {}, [[]], [{}], [1, "a"], {"a": 1}, {"content": 1}, [None], _nested(DEEP))


def bent(rng: random.Random, value: Any) -> Any:
    """The same value with one part of it replaced, repeated or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: bent(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        parts = rng.choice(([bent(rng, value[at])], [], [value[at]] * 2))
        return [*value[:at], *parts, *value[at + 1 :]]
    return rng.choice(SCALARS + SHAPES)
