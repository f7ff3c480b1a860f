"""vLLM's KV cache as pages: one (blocks, page bytes) array per layer, and the fingerprints of model and layout.

Accepts only what it knows: one KV group of full attention in host memory, unquantized, its heads split over the ranks
of one tensor-parallel group. Everything else is refused in one sentence, before any byte moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdx.engine.copier import Pages
from pdx.engine.vllm import compat
from pdx.errors import Refused
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.layout import PageLayout

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file
SAFETENSORS_HEADER_BYTES_MAX = 100 << 20  # the format's own limit
PAGE_ORDER = "LBHNC"  # a block of one layer is contiguous: heads, then tokens, then K|V
_PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Description:
    """What both roles of an engine say of it, from configuration alone."""

    content: ContentFingerprint
    layout: LayoutFingerprint  # layers and pages as one rank has them
    pages: PageLayout


@dataclass(frozen=True)
class Caches:
    """The engine's pages by layer, in the order in which the model computes them."""

    pages: tuple[Pages, ...]
    layer_of: Mapping[str, int]


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *, chunk_tokens: int) -> Description:
    """Raises Refused for every engine whose KV pdx cannot carry."""
    version = compat.check_version()
    spec = _only_spec(vllm_config, kv_cache_config)
    layers = len(kv_cache_config.kv_cache_groups[0].layer_names)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    layout = LayoutFingerprint(
        engine=f"vllm {version}",
        attention=compat.attention_name(vllm_config, head_size=spec.head_size, block_tokens=spec.block_size),
        layers=layers,
        page_bytes=spec.page_size_bytes,
        block_tokens=spec.block_size,
        packing=f"{PAGE_ORDER} K|V {spec.num_kv_heads}x{spec.head_size} {_dtype_name(spec.dtype)}",
        kv_groups=1,
        ranks=ranks,
    )
    chunk_blocks = 1 << (max(1, chunk_tokens // spec.block_size).bit_length() - 1)
    try:
        pages = PageLayout(
            layers=layers * ranks, page_bytes=spec.page_size_bytes, chunk_blocks=chunk_blocks, shards=ranks
        )
    except ValueError as error:
        raise Refused(f"tensor parallelism of {ranks} is not supported with {layers} layers: {error}") from error
    return Description(_content(vllm_config, spec.block_size), layout, pages)


def view(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig, layout: PageLayout) -> Caches:
    """Byte views of the registered tensors. Raises Refused unless each page is contiguous, whole and its own."""
    (group,) = kv_cache_config.kv_cache_groups
    names = sorted(group.layer_names, key=compat.layer_index)
    unknown = set(kv_caches).symmetric_difference(names)
    if unknown:
        raise Refused(f"vLLM registered other KV caches than it announced: {', '.join(sorted(unknown))}")
    starts = {kv_caches[name].data_ptr() for name in names}
    if len(starts) != len(names):
        raise Refused("layers that share one KV cache are not supported")
    pages = tuple(_pages_of(name, kv_caches[name], kv_cache_config.num_blocks, layout.page_bytes) for name in names)
    return Caches(pages, {name: layer for layer, name in enumerate(names)})


def _pages_of(name: str, cache: torch.Tensor, num_blocks: int, page_bytes: int) -> Pages:
    """A (num_blocks, page_bytes) byte array over the cache's own memory."""
    import torch

    if cache.device.type != "cpu":
        raise Refused(f"{name}: KV cache is in {cache.device.type} memory; only host memory is supported")
    if cache.shape[0] != num_blocks or cache[0].nbytes != page_bytes:
        raise Refused(f"{name}: KV cache of shape {tuple(cache.shape)} is not {num_blocks} pages of {page_bytes} bytes")
    if not cache[0].is_contiguous():
        raise Refused(f"{name}: pages are not contiguous (strides {cache.stride()}); unset VLLM_KV_CACHE_LAYOUT")
    stride_bytes = cache.stride(0) * cache.element_size()
    if stride_bytes < page_bytes:
        raise Refused(f"{name}: pages overlap (strides {cache.stride()})")
    start_bytes = cache.storage_offset() * cache.element_size()
    flat = torch.tensor([], dtype=torch.uint8)
    return flat.set_(cache.untyped_storage(), start_bytes, (num_blocks, page_bytes), (stride_bytes, 1)).numpy()


def _only_spec(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> FullAttentionSpec:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel = vllm_config.parallel_config
    for what, size in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("decode context", parallel.decode_context_parallel_size),
        ("prefill context", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise Refused(f"{what} parallelism of {size} is not supported yet: run one engine per rank")
    if vllm_config.speculative_config is not None:
        raise Refused("speculative decoding is not supported yet: unset --speculative-config")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in _PLAIN_CACHE_DTYPES:
        raise Refused(f"KV cache dtype {cache_dtype!r} is not supported: its scales do not travel")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise Refused(f"models with {len(groups)} KV cache groups are not supported yet")
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        raise Refused(f"KV caches of kind {type(spec).__name__} are not supported yet, only full attention")
    if spec.page_size_padded is not None:
        raise Refused("padded KV pages are not supported yet")
    hash_tokens = kv_cache_config.hash_block_size or spec.block_size
    if hash_tokens != spec.block_size:
        raise Refused(f"block hashes cover {hash_tokens} tokens, KV blocks {spec.block_size}: make them equal")
    return spec


def _content(vllm_config: VllmConfig, block_tokens: int) -> ContentFingerprint:
    model = vllm_config.model_config
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    return ContentFingerprint(
        model=str(model.served_model_name or model.model),
        weights=_weights_digest(vllm_config),
        weight_epoch=0,
        dtype=_dtype_name(model.dtype),
        block_tokens=block_tokens,
        hash_algorithm=f"{algorithm}/{compat.hash_seed(algorithm)}",
    )


def _weights_digest(vllm_config: VllmConfig) -> str:
    """Names, sizes, headers and samples of the weight files, and what changes their meaning. Not their gigabytes.

    The samples tell checkpoints of one shape apart: training changes nearly every weight.
    """
    model = vllm_config.model_config
    digest = hashlib.blake2b(digest_size=16, person=b"pdx-weights")
    overrides = {
        "hf_overrides": repr(model.hf_overrides),
        "quantization": model.quantization,
        "rope": repr(getattr(model.hf_config, "rope_parameters", None)),
        "load_format": str(vllm_config.load_config.load_format),
    }
    if overrides["load_format"] == "dummy":  # random weights
        overrides["seed"] = model.seed
    folder = Path(model.model)
    if not folder.is_dir():
        overrides |= {"model": model.model, "revision": model.revision}
    digest.update(json.dumps(overrides, sort_keys=True, default=str).encode())
    for part in _weight_files(folder) if folder.is_dir() else ():
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _weight_files(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.iterdir()):
        if path.name == "config.json":
            yield path.read_bytes()
        elif path.suffix in WEIGHT_SUFFIXES:
            yield f"{path.name} {path.stat().st_size}".encode()
            if path.suffix == ".safetensors":
                yield _safetensors_header(path)
            yield from _samples(path)


def _samples(path: Path) -> Iterator[bytes]:
    """Spread evenly over the file, its last bytes among them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, (size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
            yield file.read(SAMPLE_BYTES)


def _safetensors_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > SAFETENSORS_HEADER_BYTES_MAX:
            raise Refused(f"{path.name} is no safetensors file")
        return file.read(length)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
