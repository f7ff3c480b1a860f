"""What all buffer tests share: small arenas, and the check that no test leaves a descriptor behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pdx.buffer.arena import Arena
from pdx.buffer.store import Store
from pdx.layout import CONTROL_BYTES

EXTENT_BYTES = 64 << 10
EXTENTS = 4


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(CONTROL_BYTES + EXTENTS * EXTENT_BYTES) as arena:
        yield arena


@pytest.fixture
def store(arena: Arena) -> Iterator[Store]:
    store = Store(arena, extent_bytes=EXTENT_BYTES, handoff_share=0.9, poison=True)
    yield store
    store.check_integrity()
