"""The kernels of page_copy.cu, run on the host: every page lands, nothing else is touched, digests are xxh3's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from page_copy_on_host import MODES, UNTOUCHED, Bytes, OnHost, Shape

from pdx.engine.kernels import DIGEST_BYTES_MIN, Mode, fault_of, launch_of, reference

MANY, FEW = 132, 1  # processors: a large team for each page, or a small one
HOLE = -1


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    return OnHost(tmp_path_factory.mktemp("page_copy"))


def check(
    on_host: OnHost, mode: str, shape: Shape, ids: Sequence[int], *, digest: bool, processors: int, seed: int = 1
) -> None:
    """Against plain slices and the xxhash library; what lies between pages is compared too."""
    random = np.random.default_rng(seed)
    cache = random.integers(0, 256, shape.cache_bytes(), dtype=np.uint8)
    slab = random.integers(0, 256, shape.slab_bytes(len(ids)), dtype=np.uint8)
    wanted_cache, wanted_slab = cache.copy(), slab.copy()
    wanted = [UNTOUCHED] * (shape.layers * len(ids))
    for layer in range(shape.layers):
        for position, block_id in enumerate(ids):
            page, place = shape.in_cache(layer, block_id), shape.in_slab(layer, position, len(ids))
            if block_id != HOLE and mode == "gather":
                wanted_slab[place] = wanted_cache[page]
            elif block_id != HOLE and mode == "scatter":
                wanted_cache[page] = wanted_slab[place]
            if digest:
                data = b"" if block_id == HOLE else wanted_cache[page].tobytes()
                wanted[layer * len(ids) + position] = xxhash.xxh3_64_intdigest(data) if data else 0
    twin_cache, twin_slab = cache.copy(), slab.copy()
    assert on_host.reference(mode, shape, ids, twin_cache, twin_slab, digest=digest) == wanted
    fault, digests = on_host.move(mode, shape, ids, cache, slab, digest=digest, processors=processors)
    assert (fault, digests) == ("", wanted)
    for found, right in ((cache, wanted_cache), (slab, wanted_slab), (twin_cache, wanted_cache)):
        assert np.array_equal(found, right)
    assert np.array_equal(twin_slab, wanted_slab)


@pytest.mark.parametrize("mode", ["gather", "scatter"])
def test_every_small_page(on_host: OnHost, mode: str) -> None:
    """All sizes up to three vectors of 16 bytes, at every alignment of the memory."""
    for page_bytes in range(1, 49):
        for offset in (0, 1, 8):
            shape = Shape(page_bytes, num_blocks=3, extra=-page_bytes % 16, gap=offset, offset=offset)
            check(on_host, mode, shape, [2, HOLE, 0], digest=False, processors=MANY)


EDGES = sorted(
    {size for edge in (DIGEST_BYTES_MIN, 256, 1024, 1088, 2048) for size in (edge, edge + 1, edge + 15, edge + 16)}
    | {edge - 1 for edge in (256, 1024, 1088, 2048)}
    | {4096, 5000, 20 << 10, (64 << 10) + 16}  # more than one round of a small team, and of a large one
)


@pytest.mark.parametrize("processors", [FEW, MANY], ids=["small team", "large team"])
@pytest.mark.parametrize("mode", MODES)
def test_sizes_around_every_edge_of_the_digest(on_host: OnHost, mode: str, processors: int) -> None:
    for page_bytes in EDGES:
        ids = [3, HOLE, 0, 2] if mode == "scatter" else [3, HOLE, 3, 1]
        check(on_host, mode, Shape(page_bytes, extra=-page_bytes % 16), ids, digest=True, processors=processors)
    odd = Shape(1500, layers=1, extra=3, gap=5, offset=1)
    check(on_host, mode, odd, [4, 0, HOLE], digest=True, processors=processors)


def test_more_pages_than_blocks_of_threads(on_host: OnHost) -> None:
    """With one processor 32 blocks of threads take 90 pages, holes among them, one after the other."""
    ids = [HOLE if n % 5 == 2 else n % 7 for n in range(90)]
    check(on_host, "gather", Shape(2064, layers=1, num_blocks=7), ids, digest=True, processors=FEW)


@given(data=st.data())
@settings(max_examples=25)
def test_random_shapes(on_host: OnHost, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(MODES))
    digest = mode == "look" or data.draw(st.booleans())
    shape = Shape(
        page_bytes=data.draw(st.integers(DIGEST_BYTES_MIN if digest else 1, 9000)),
        layers=data.draw(st.integers(1, 3)), num_blocks=data.draw(st.integers(1, 9)),
        extra=data.draw(st.integers(0, 40)), gap=data.draw(st.integers(0, 40)), offset=data.draw(st.integers(0, 15)),
    )  # fmt: skip
    some = st.integers(0, shape.num_blocks - 1)
    ids = data.draw(st.lists(some, max_size=9, unique=mode == "scatter"))
    for _ in range(data.draw(st.integers(0, 2))):
        ids.insert(data.draw(st.integers(0, len(ids))), HOLE)
    processors = data.draw(st.sampled_from([FEW, MANY]))
    check(on_host, mode, shape, ids, digest=digest, processors=processors, seed=data.draw(st.integers(0, 9)))


def test_a_large_layer(on_host: OnHost) -> None:
    """64 pages of the demo's model in one launch: 6 MiB."""
    order = np.random.default_rng(3).permutation(64).tolist()
    check(on_host, "gather", Shape(96 << 10, layers=1, num_blocks=64), order, digest=False, processors=MANY)
    check(on_host, "gather", Shape(96 << 10, layers=1, num_blocks=64), order[:12], digest=True, processors=MANY)


@pytest.mark.parametrize(
    ("mode", "shape", "ids", "digest", "fault"),
    [
        ("gather", Shape(16), [5], False, "outside the cache"),
        ("scatter", Shape(16), [1, 2, 1], False, "into one block"),
        ("gather", Shape(240), [1], True, "no digest"),
        ("look", Shape(256), [1], False, "nothing to do"),
        ("gather", Shape(16, extra=-1), [1], False, "overlap in the cache"),
        ("gather", Shape(16, gap=-1), [1], False, "overlap in the slab"),
        ("gather", Shape(16), [], False, ""),
    ],
)
def test_what_the_launcher_refuses(
    on_host: OnHost, mode: str, shape: Shape, ids: list[int], digest: bool, fault: str
) -> None:
    cache, slab = np.zeros(shape.cache_bytes(), np.uint8), np.zeros(shape.slab_bytes(len(ids)), np.uint8)
    found, _ = on_host.move(mode, shape, ids, cache, slab, digest=digest, processors=MANY)
    assert fault in found and bool(found) == bool(fault)
    assert not cache.any() and not slab.any()


def test_pythons_launcher_refuses_the_same() -> None:
    assert "outside" in fault_of("gather", [5], num_blocks=5, page_bytes=256, digest=True)
    assert "one block" in fault_of("scatter", [1, 2, 1], num_blocks=5, page_bytes=256, digest=True)
    assert "digest" in fault_of("gather", [1], num_blocks=5, page_bytes=240, digest=True)
    assert fault_of("gather", [1, 1, HOLE, HOLE], num_blocks=5, page_bytes=256, digest=True) == ""


@given(
    digest=st.booleans(), layers=st.integers(1, 4), count=st.integers(1, 20_000), page_bytes=st.integers(241, 1 << 21),
    processors=st.integers(1, 200),
)  # fmt: skip
def test_both_launchers_choose_the_same_grid(
    on_host: OnHost, digest: bool, layers: int, count: int, page_bytes: int, processors: int
) -> None:
    _, grid, threads = launch_of(count, layers, page_bytes, processors, digest=digest)
    theirs = on_host.plan(
        "gather", digest=digest, layers=layers, count=count, page_bytes=page_bytes, processors=processors
    )
    assert (grid, threads) == theirs


@pytest.mark.parametrize("mode", MODES)
def test_torch_reference_and_kernel_agree(on_host: OnHost, mode: Mode) -> None:
    shape, ids = Shape(1040, extra=16), [3, HOLE, 0]
    random = np.random.default_rng(5)
    cache: Bytes = random.integers(0, 256, shape.cache_bytes(), dtype=np.uint8)
    slab: Bytes = random.integers(0, 256, shape.slab_bytes(len(ids)), dtype=np.uint8)
    by_torch, torchs_slab = torch.from_numpy(cache.copy()), torch.from_numpy(slab.copy())
    pages = [layer[:, : shape.page_bytes] for layer in by_torch.view(shape.layers, shape.num_blocks, shape.stride)]
    digests = reference(mode, pages, ids, torchs_slab.view(shape.layers, len(ids), shape.page_bytes), digest=True)
    fault, found = on_host.move(mode, shape, ids, cache, slab, digest=True, processors=MANY)
    assert (fault, found) == ("", digests)
    assert np.array_equal(cache, by_torch.numpy()) and np.array_equal(slab, torchs_slab.numpy())
