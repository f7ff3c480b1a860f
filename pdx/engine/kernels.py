"""The launcher of cuda/page_copy.cu: compiles it for the device at hand, keeps what it made, checks and enqueues.

NVRTC compiles at the user's, through cuda.core: no compiler is needed there, only the extra `pdx-kv[cuda]`. What it
made is kept in the folder that it is given (the connector's: `kernels` in the run directory), named by everything that
it depends on. Nothing here touches CUDA before a `Kernels` is made. `reference` does the same with torch alone, on any
device: what the kernels are compared with.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import xxhash

from pdx.errors import DeviceLost, Refused
from pdx.whole import write_whole

if TYPE_CHECKING:
    from cuda.core import ObjectCode
    from cuda.core import Stream as CoreStream

Mode = Literal["gather", "scatter", "look"]

# As in page_copy.cu, which says why.
BLOCK_BYTES, COPY_WARPS, WAVES = 1024, 8, 4
DIGEST_BYTES_MIN = 241
PAGE_BYTES_MAX = 1 << 30
CHECK_BYTES = 16  # before a kept cubin
OPTIONS = ("c++17",)


class Team(NamedTuple):
    """Warps that copy a page together, and how many teams a processor holds."""

    warps: int
    resident: int


TEAMS = {"": Team(4, 8), "_large": Team(16, 2)}  # by the kernels' suffix


def source() -> str:
    """The kernels' text."""
    return importlib.resources.files("pdx").joinpath("cuda", "page_copy.cu").read_text(encoding="utf-8")


def compile_for(arch: str) -> bytes:
    """A cubin for e.g. "sm_90"; about 1.5 s. Needs neither GPU nor driver. Raises Refused, naming what is missing."""
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise _missing(error) from error
    try:
        program = Program(source(), "c++", ProgramOptions(arch=arch, std=OPTIONS[0]))
        return bytes(program.compile("cubin").code)
    except Exception as error:  # cuda.core has a class for each library that it misses
        raise Refused(f"NVRTC did not compile page_copy.cu for {arch}: {error}") from error


def cubin_for(arch: str, folder: Path) -> bytes:
    """From `folder`, if the same compiler made it from the same text before; else compiled now and kept there."""
    from cuda.bindings import nvrtc

    version = nvrtc.nvrtcVersion()[1:]
    text = f"{version} {OPTIONS} {source()}"
    name = hashlib.blake2b(text.encode(), digest_size=12, person=b"pdx-cubin-2").hexdigest()
    path = folder / f"page_copy-{arch}-{name}.cubin"
    try:
        if path.stat().st_uid == os.getuid():
            kept = path.read_bytes()
            if kept[:CHECK_BYTES] == _check(kept[CHECK_BYTES:]):
                return kept[CHECK_BYTES:]
    except OSError:
        pass  # not there, or not ours to read, or cut by a power failure: then it is made anew
    cubin = compile_for(arch)
    keep(path, _check(cubin) + cubin)
    return cubin


def _check(cubin: bytes) -> bytes:
    return hashlib.blake2b(cubin, digest_size=CHECK_BYTES).digest()


def keep(path: Path, content: bytes) -> None:
    """In one step, so that nobody reads half of it. A folder that can't be written to only costs the work again."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError:
        pass


def _missing(error: ImportError) -> Refused:
    return Refused(f"KV in GPU memory needs cuda.core: pip install 'pdx-kv[cuda]' ({error})")


class Kernels:
    """Ready to launch on one device. Any thread; a launch belongs to the thread that owns its stream."""

    def __init__(self, device_index: int, folder: Path) -> None:
        """Raises Refused without cuda.core, DeviceLost without a working device."""
        try:
            from cuda.core import Device, LaunchConfig, ObjectCode, launch
        except ImportError as error:
            raise _missing(error) from error
        try:
            self._device = Device(device_index)
            self._device.set_current()
            self.processors = int(self._device.properties.multiprocessor_count)
            self.identity = str(self._device.uuid)
            cubin = cubin_for(f"sm_{self._device.arch}", folder)
            self._code: ObjectCode = ObjectCode.from_cubin(cubin, name="page_copy")
        except Refused:
            raise
        except Exception as error:
            raise DeviceLost(f"the kernels can't be loaded: {error}") from error
        self._launch, self._config = launch, LaunchConfig
        self._kernels: dict[str, Any] = {}

    def enqueue(
        self,
        stream: CoreStream,
        mode: Mode,
        *,
        layers: int,
        layer_count: int,
        block_ids: int,
        count: int,
        slab: int,
        page_bytes: int,
        digests: int,
        wide: bool,
    ) -> None:
        """Moves `count` pages of each of `layer_count` layers. Addresses are the device's: `layers` of a table of
        (base, stride) pairs of int64, `block_ids` of int32, `digests` of uint64, or 0 for none.

        Whoever made the block list has checked it (`fault_of`). `wide`: all page addresses are multiples of 16. Raises
        DeviceLost.
        """
        if count == 0:
            return
        suffix, grid, threads = launch_of(count, layer_count, page_bytes, self.processors, digest=bool(digests))
        name = f"pdx_{mode}" + ("_digest" if digests else "") + ("" if wide else "_bytes") + suffix
        try:
            kernel = self._kernels.get(name)
            if kernel is None:
                kernel = self._kernels[name] = self._code.get_kernel(name)
            config = self._config(grid=grid, block=threads)
            self._launch(
                stream, config, kernel, layers, layer_count, block_ids, count, slab, page_bytes, page_bytes, digests
            )
        except Exception as error:
            raise DeviceLost(f"{name} could not be launched: {error}") from error


def launch_of(
    count: int, layer_count: int, page_bytes: int, processors: int, *, digest: bool
) -> tuple[str, tuple[int, int], int]:
    """(kernel suffix, grid, threads), as `plan` in page_copy.cu says."""
    if not digest:
        blocks = -(-page_bytes // BLOCK_BYTES)
        return "", (-(-count * blocks // COPY_WARPS), layer_count), COPY_WARPS * 32
    pages = layer_count * count
    suffix = "_large" if pages < small_teams_from(processors) else ""
    team = TEAMS[suffix]
    return suffix, (min(pages, processors * team.resident * WAVES), 1), (team.warps + 1) * 32


def small_teams_from(processors: int) -> int:
    """How many pages are moved by small teams; fewer are by other kernels."""
    return TEAMS[""].resident * processors


def fault_of(mode: Mode, block_ids: Sequence[int], *, num_blocks: int, page_bytes: int, digest: bool) -> str:
    """What is wrong with a block list; empty if nothing is. A negative id is a hole."""
    if not 1 <= page_bytes <= PAGE_BYTES_MAX:
        return f"a page has between 1 and 2^30 bytes, not {page_bytes}"
    if digest and page_bytes < DIGEST_BYTES_MIN:
        return f"pages of {page_bytes} bytes have no digest here"
    if max(block_ids, default=-1) >= num_blocks:
        return f"block {max(block_ids)} is outside a cache of {num_blocks}"
    if mode == "scatter":
        whole = [block_id for block_id in block_ids if block_id >= 0]
        if len(set(whole)) != len(whole):
            return "two pages would be scattered into one block"
    return ""


def reference(
    mode: Mode, pages: Sequence[torch.Tensor], block_ids: Sequence[int], slab: torch.Tensor, *, digest: bool
) -> list[int]:
    """The same with torch. `pages`: per layer (blocks, page bytes) uint8; `slab`: (layers, positions, page bytes)."""
    digests = [0] * (len(pages) * len(block_ids)) if digest else []
    for layer, cache in enumerate(pages):
        for position, block_id in enumerate(block_ids):
            if block_id < 0:
                continue
            if mode == "gather":
                slab[layer, position] = cache[block_id]
            elif mode == "scatter":
                cache[block_id] = slab[layer, position]
            if digest:
                page = bytes(cache[block_id].cpu().numpy())
                digests[layer * len(block_ids) + position] = xxhash.xxh3_64_intdigest(page)
    return digests
