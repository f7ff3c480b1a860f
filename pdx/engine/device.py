"""CUDA, as movement sees it: torch's streams, events and memory, our kernels, the driver's copies.

Implements `streams.Device`; what its calls promise is said there. The engine has torch and a current stream already;
streams of our own are torch's too, so that its allocator and its events know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pdx.engine.kernels import Kernels, Mode, fault_of, small_teams_from
from pdx.engine.streams import Copy
from pdx.errors import DeviceLost, DeviceShort, Refused

LAYER_BYTES = 16  # of the kernels' table: base and stride


@dataclass(frozen=True)
class CudaStream:
    torch: torch.cuda.Stream
    core: Any  # cuda.core's view of it; None for the engine's, on which we launch nothing


@dataclass(frozen=True)
class CudaBlocks:
    """Block ids on the device. The pinned copy is kept until they have surely got there."""

    ids: list[int]
    on_device: torch.Tensor
    pinned: torch.Tensor


@dataclass(frozen=True)
class CudaStaging:
    pages_max: int
    memory: torch.Tensor


@dataclass(frozen=True)
class CudaPinned:
    memory: torch.Tensor


@dataclass(frozen=True)
class CudaDigests:
    """Written by the kernel straight into pinned memory: eight bytes a page, for which no copy is worth its start."""

    values: torch.Tensor

    def read(self) -> Sequence[int]:
        return [value & 0xFFFF_FFFF_FFFF_FFFF for value in self.values.tolist()]


class CudaDevice:
    """The device of one engine's KV cache: per layer a (blocks, page bytes) uint8 view of it."""

    def __init__(self, caches: Sequence[torch.Tensor], folder: Path) -> None:
        """`folder` keeps compiled kernels. Raises Refused for caches that the kernels can't move, DeviceLost."""
        blocks, page_bytes = caches[0].shape
        self.page_bytes, self.num_blocks = page_bytes, blocks
        fault = fault_of("gather", [], num_blocks=blocks, page_bytes=page_bytes, digest=True)
        if fault:
            raise Refused(fault)
        if any(cache.shape != caches[0].shape or cache.device != caches[0].device for cache in caches):
            raise Refused("layers whose caches differ in shape or device are not supported")
        self._caches = list(caches)
        self._index = caches[0].device.index or 0
        self._kernels = Kernels(self._index, folder)
        with self._current(), lost():
            table = [(cache.data_ptr(), cache.stride(0)) for cache in caches]
            self._table = torch.tensor(table, dtype=torch.int64, device=caches[0].device)
        alignment = page_bytes
        for base, stride in table:
            alignment |= base | stride
        self._wide = alignment % 16 == 0
        self.identity = self._kernels.identity
        self._load_kernels()

    def _load_kernels(self) -> None:
        """CUDA loads a kernel when it is first launched, for which the host may wait: not in a step of the engine's.
        So each is launched now, over nothing but holes."""
        stream = self.new_stream()
        modes: tuple[Mode, ...] = ("gather", "scatter", "look")
        for count in (1, small_teams_from(self._kernels.processors)):
            blocks = self.block_list(stream, [-1] * count)
            digests = [self._move(stream, mode, 0, blocks, 0, count, None) for mode in modes]
            self.synchronize(self.record(stream))
            assert not any(value for found in digests for value in found.read())

    # --- memory -----------------------------------------------------------------------------------------------

    def pin(self, memory: memoryview) -> CudaPinned:
        from cuda.bindings import driver

        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        # By the driver: the runtime would keep a failure, and give it to the engine's next check of its own kernels.
        with self._current():
            (status,) = driver.cuMemHostRegister(tensor.data_ptr(), tensor.nbytes, driver.CU_MEMHOSTREGISTER_PORTABLE)
        if int(status) != 0:
            raise Refused(
                f"{tensor.nbytes >> 20} MiB of arena can't be pinned ({status!r}): raise the limit of locked memory "
                "(ulimit -l) or make the arena smaller"
            )
        return CudaPinned(tensor)

    def pinned(self, memory: torch.Tensor) -> CudaPinned:
        """Of memory that torch has pinned."""
        return CudaPinned(memory)

    def unpin(self, pinned: CudaPinned) -> None:
        from cuda.bindings import driver

        with self._current():
            check(driver.cuMemHostUnregister(pinned.memory.data_ptr()), "unpinning the arena")

    def new_staging(self, pages_max: int) -> CudaStaging:
        with self._current(), lost():
            memory = torch.empty(pages_max * self.page_bytes, dtype=torch.uint8, device=self._caches[0].device)
        return CudaStaging(pages_max, memory)

    def block_list(self, stream: CudaStream, block_ids: Sequence[int]) -> CudaBlocks:
        ids = list(block_ids)
        fault = fault_of("gather", ids, num_blocks=self.num_blocks, page_bytes=self.page_bytes, digest=True)
        assert not fault, fault
        with self._current(), torch.cuda.stream(stream.torch), lost():
            pinned = torch.tensor(ids, dtype=torch.int32, pin_memory=True)
            return CudaBlocks(ids, pinned.to(self._caches[0].device, non_blocking=True), pinned)

    # --- streams and events -----------------------------------------------------------------------------------

    def compute_stream(self) -> CudaStream:
        return CudaStream(torch.cuda.current_stream(self._index), None)

    def new_stream(self) -> CudaStream:
        from cuda.core import Stream

        with self._current(), lost():
            stream = torch.cuda.Stream(self._index)
            return CudaStream(stream, Stream.from_handle(stream.cuda_stream))

    def record(self, stream: CudaStream) -> torch.cuda.Event:
        with lost():
            event = torch.cuda.Event(blocking=True)
            event.record(stream.torch)
            return event

    def wait(self, stream: CudaStream, event: torch.cuda.Event) -> None:
        with lost():
            stream.torch.wait_event(event)

    def reached(self, event: torch.cuda.Event) -> bool:
        with lost():
            return bool(event.query())

    def synchronize(self, event: torch.cuda.Event) -> None:
        with self._current(), lost():
            event.synchronize()

    # --- kernels ----------------------------------------------------------------------------------------------

    def gather(
        self, stream: CudaStream, layer: int, blocks: CudaBlocks, first: int, count: int, staging: CudaStaging
    ) -> CudaDigests:
        return self._move(stream, "gather", layer, blocks, first, count, staging)

    def scatter(
        self, stream: CudaStream, layer: int, blocks: CudaBlocks, first: int, count: int, staging: CudaStaging
    ) -> CudaDigests:
        return self._move(stream, "scatter", layer, blocks, first, count, staging)

    def look(self, stream: CudaStream, layer: int, blocks: CudaBlocks, first: int, count: int) -> CudaDigests:
        return self._move(stream, "look", layer, blocks, first, count, None)

    def _move(
        self,
        stream: CudaStream,
        mode: Mode,
        layer: int,
        blocks: CudaBlocks,
        first: int,
        count: int,
        staging: CudaStaging | None,
    ) -> CudaDigests:
        with self._current(), lost():
            digests = torch.empty(count, dtype=torch.int64, pin_memory=True)
        self.launch(stream, mode, layer, blocks, first, count, staging, digests.data_ptr())
        return CudaDigests(digests)

    def launch(
        self,
        stream: CudaStream,
        mode: Mode,
        layer: int,
        blocks: CudaBlocks,
        first: int,
        count: int,
        staging: CudaStaging | None,
        digests: int,
    ) -> None:
        """`digests`: where the device writes them, or 0 for none."""
        assert 0 <= first and first + count <= len(blocks.ids)
        assert staging is None or count <= staging.pages_max
        self._kernels.enqueue(
            stream.core,
            mode,
            layers=self._table.data_ptr() + layer * LAYER_BYTES,
            layer_count=1,
            block_ids=blocks.on_device.data_ptr() + first * 4,
            count=count,
            slab=staging.memory.data_ptr() if staging is not None else 0,
            page_bytes=self.page_bytes,
            digests=digests,
            wide=self._wide,
        )

    # --- copies -----------------------------------------------------------------------------------------------

    def copy_out(self, stream: CudaStream, staging: CudaStaging, arena: CudaPinned, copies: Sequence[Copy]) -> None:
        base, slots = staging.memory.data_ptr(), arena.memory.data_ptr()
        size = self.page_bytes
        self._copy(stream, [(slots + c.arena_offset, base + c.first * size, c.pages * size) for c in copies])

    def copy_in(self, stream: CudaStream, arena: CudaPinned, staging: CudaStaging, copies: Sequence[Copy]) -> None:
        base, slots = staging.memory.data_ptr(), arena.memory.data_ptr()
        size = self.page_bytes
        self._copy(stream, [(base + c.first * size, slots + c.arena_offset, c.pages * size) for c in copies])

    def copy_straight(
        self,
        stream: CudaStream,
        arena: CudaPinned,
        layer: int,
        blocks: CudaBlocks,
        copies: Sequence[Copy],
        *,
        out: bool = False,
    ) -> None:
        cache, slots, size = self._caches[layer], arena.memory.data_ptr(), self.page_bytes
        base, stride = cache.data_ptr(), cache.stride(0)
        pairs = [
            (base + blocks.ids[copy.first + n] * stride, slots + copy.arena_offset + n * size)
            for copy in copies
            for n in range(copy.pages)
            if blocks.ids[copy.first + n] >= 0
        ]
        self._copy(stream, [(place, page, size) if out else (page, place, size) for page, place in pairs])

    def _copy(self, stream: CudaStream, copies: Sequence[tuple[int, int, int]]) -> None:
        """(to, from, bytes) each, as one batch: between single copies the copy engine stands still for 2 us."""
        from cuda.bindings import driver

        handle = stream.torch.cuda_stream
        if not copies:
            return
        if len(copies) == 1:
            to, start, length = copies[0]
            check(driver.cuMemcpyAsync(to, start, length, handle), "a copy")
            return
        attributes = driver.CUmemcpyAttributes()
        attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        tos = [driver.CUdeviceptr(to) for to, _, _ in copies]
        starts = [driver.CUdeviceptr(start) for _, start, _ in copies]
        lengths = [length for _, _, length in copies]
        with lost():  # the bindings raise where the driver is older than the call (12.8)
            result = driver.cuMemcpyBatchAsync(tos, starts, lengths, len(copies), [attributes], [0], 1, handle)
        check(result, "a batch of copies")

    def page(self, layer: int, block_id: int) -> bytes:
        with lost():
            return bytes(self._caches[layer][block_id].cpu().numpy())

    @contextmanager
    def _current(self) -> Iterator[None]:
        with torch.cuda.device(self._index):
            yield


def check(result: tuple[Any, ...], what: str) -> None:
    """Raises DeviceLost unless the driver has taken the call."""
    if int(result[0]) != 0:
        raise DeviceLost(f"{what} was not taken by the driver: {result[0]!r}")


@contextmanager
def lost() -> Iterator[None]:
    """torch reports what the device has met as RuntimeError, of which being out of memory is one kind."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceShort(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        raise DeviceLost(str(error).splitlines()[0]) from error
