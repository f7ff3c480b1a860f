"""cuda/page_copy.cu compiled for this machine's processor: the kernel's own statements, thread by thread."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SOURCES = Path(__file__).resolve().parent.parent.parent / "cuda"
MODES = ("gather", "scatter", "look")
UNTOUCHED = 7  # of digests

Bytes = npt.NDArray[np.uint8]


class Layer(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("stride_bytes", ctypes.c_longlong))


@dataclass(frozen=True)
class Shape:
    """`extra` bytes lie behind each page in the cache, `gap` in the slab; all memory starts at an odd `offset`."""

    page_bytes: int
    layers: int = 2
    num_blocks: int = 5
    extra: int = 0
    gap: int = 0
    offset: int = 0

    @property
    def stride(self) -> int:
        return self.page_bytes + self.extra

    @property
    def pitch(self) -> int:
        return self.page_bytes + self.gap

    def cache_bytes(self) -> int:
        return self.offset + self.layers * self.num_blocks * self.stride

    def slab_bytes(self, count: int) -> int:
        return self.offset + self.layers * count * self.pitch

    def in_cache(self, layer: int, block_id: int) -> slice:
        start = self.offset + (layer * self.num_blocks + block_id) * self.stride
        return slice(start, start + self.page_bytes)

    def in_slab(self, layer: int, position: int, count: int) -> slice:
        start = self.offset + (layer * count + position) * self.pitch
        return slice(start, start + self.page_bytes)


class OnHost:
    """The library. Memory is given with each call."""

    def __init__(self, folder: Path) -> None:
        library = folder / "page_copy.so"
        flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
        sources = ["-include", str(SOURCES / "on_host.h"), "-x", "c++", str(SOURCES / "page_copy.cu")]
        command = ["g++", *flags, *sources, "-o", str(library)]
        subprocess.run(command, check=True, timeout=120)
        self._library = ctypes.CDLL(str(library))
        self._library.pdx_move_pages.restype = ctypes.c_char_p

    def move(
        self, mode: str, shape: Shape, ids: Sequence[int], cache: Bytes, slab: Bytes, *, digest: bool, processors: int
    ) -> tuple[str, list[int]]:
        """(what was refused, digests)."""
        digests = self._digests(shape, ids)
        fault = self._library.pdx_move_pages(
            *self._arguments(mode, shape, ids, cache, slab, digests if digest else None), processors
        )
        return (fault or b"").decode(), list(digests)

    def reference(
        self, mode: str, shape: Shape, ids: Sequence[int], cache: Bytes, slab: Bytes, *, digest: bool
    ) -> list[int]:
        digests = self._digests(shape, ids)
        mode_, layers, count, list_, length, _, *rest = self._arguments(
            mode, shape, ids, cache, slab, digests if digest else None
        )
        self._library.pdx_move_pages_reference(mode_, layers, count, list_, length, *rest)
        return list(digests)

    def plan(
        self, mode: str, *, digest: bool, layers: int, count: int, page_bytes: int, processors: int
    ) -> tuple[tuple[int, int], int]:
        """(grid, threads)."""
        chosen = (ctypes.c_uint * 3)()
        self._library.pdx_plan(
            MODES.index(mode), int(digest), layers, count, ctypes.c_longlong(page_bytes), processors, chosen
        )
        return (chosen[0], chosen[1]), chosen[2]

    @staticmethod
    def _digests(shape: Shape, ids: Sequence[int]) -> Any:
        pages = shape.layers * len(ids)
        return (ctypes.c_ulonglong * pages)(*([UNTOUCHED] * pages))

    @staticmethod
    def _arguments(mode: str, shape: Shape, ids: Sequence[int], cache: Bytes, slab: Bytes, digests: Any) -> list[Any]:
        assert cache.nbytes == shape.cache_bytes() and slab.nbytes == shape.slab_bytes(len(ids))
        layers = (Layer * shape.layers)(
            *(Layer(cache.ctypes.data + shape.in_cache(layer, 0).start, shape.stride) for layer in range(shape.layers))
        )
        start = ctypes.c_void_p(slab.ctypes.data + shape.offset) if slab.nbytes else None
        return [
            MODES.index(mode), layers, shape.layers, (ctypes.c_int * len(ids))(*ids), len(ids), shape.num_blocks, start,
            ctypes.c_longlong(shape.page_bytes), ctypes.c_longlong(shape.pitch), digests,
        ]  # fmt: skip
