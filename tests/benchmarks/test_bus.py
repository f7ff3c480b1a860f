"""Every arm is compared byte for byte before it is timed: on the host's memory, a copy that is left out is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch

from benchmarks.device.bus import verify
from benchmarks.device.common import Bench

BLOCKS, PAGE_BYTES = 8, 16
IDS = [5, 2, 7, 0, 3, 6, 1, 4]


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


class Copies:
    """Pages between the cache and the arena, one by one, but for those that are left out: (way, position)."""

    def __init__(self, left_out: tuple[str, int] | None = None) -> None:
        # No byte is 0: what was wiped shows.
        cache = torch.randint(1, 256, (BLOCKS, PAGE_BYTES), dtype=torch.uint8)
        self.bench = Bench(cast(Any, None), cache, IDS)
        self.arena = torch.zeros(BLOCKS // 2 * PAGE_BYTES, dtype=torch.uint8)
        self._left_out = left_out

    def way(self, way: str) -> Callable[[int], None]:
        def work(run: int) -> None:
            for position in range(BLOCKS // 2):
                page = self.bench.cache[IDS[self.bench.half(run) + position]]
                place = self.arena[position * PAGE_BYTES :][:PAGE_BYTES]
                if (way, self.bench.half(run) + position) != self._left_out:
                    (place if way == "out" else page).copy_(page if way == "out" else place)

        return work

    def verify(self) -> None:
        stream = cast(Any, SimpleNamespace(torch=None))
        verify(self.bench, self.arena, stream, "copies", self.way("out"), self.way("in"))


def test_copies_of_all_pages_leave_the_cache_as_it_was() -> None:
    copies = Copies()
    before = copies.bench.cache.clone()
    copies.verify()
    assert torch.equal(copies.bench.cache, before)


@pytest.mark.parametrize("position", [0, BLOCKS - 1])
@pytest.mark.parametrize("way", ["out", "in"])
def test_a_page_that_is_left_out_is_seen(way: str, position: int) -> None:
    with pytest.raises(AssertionError, match="changed on their way"):
        Copies((way, position)).verify()
