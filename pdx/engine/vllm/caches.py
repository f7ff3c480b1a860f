"""vLLM's KV cache as pages: what of it pdx carries, and each layer's (blocks, page bytes) of memory.

Accepts only what it knows: full attention, sliding windows and MLA, unquantized, in any number of groups that share one
block size and one page size, heads split over the ranks of one tensor-parallel group. Everything else is refused in one
sentence, before any byte moves.

A page is one block in one layer, whichever group the layer is in: groups differ only in where they keep their blocks.
So a block is the same position of the prompt in all layers, and each layer finds its page by its group's block table.
Layers of different groups lie over the same memory; vLLM gives a block to one group at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdx.engine.vllm import compat, orders, weights
from pdx.errors import Refused
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.layout import PageLayout

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

PREFERRED_LAYOUT = "LBHNC"  # what CPUs have; on GPUs it makes a part of the heads one piece of a page
_Where = tuple[int, tuple[int, ...]]  # first address and strides
_PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Layer:
    """One layer's KV cache, as configured."""

    name: str
    group: int
    order: str  # of a page's dimensions, outermost first
    content_bytes: int  # of a page, which may be padded


@dataclass(frozen=True)
class Layers:
    """The model's layers, numbered in the order in which it computes them."""

    number_of: Mapping[str, int]  # by vLLM's name
    group_of: tuple[int, ...]  # the KV group of each


@dataclass(frozen=True)
class Description:
    """What both roles of an engine say of it, from configuration alone."""

    content: ContentFingerprint
    layout: LayoutFingerprint  # layers and pages as one rank has them
    pages: PageLayout
    layers: tuple[Layer, ...]  # in the order in which the model computes them
    # Some layers forget what is behind their window, or there are several groups: a block may lack pages, and vLLM can
    # not be told which blocks of a load failed.
    hybrid: bool

    @property
    def numbered(self) -> Layers:
        number_of = {layer.name: number for number, layer in enumerate(self.layers)}
        return Layers(number_of, tuple(layer.group for layer in self.layers))


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *, chunk_tokens: int) -> Description:
    """Raises Refused for every engine whose KV pdx cannot carry."""
    version = compat.check_version()
    _check_engine(vllm_config)
    specs = [_checked(group.kv_cache_spec, group.is_eagle_group) for group in kv_cache_config.kv_cache_groups]
    if not specs:
        raise Refused("this model has no KV cache: there is nothing to hand over")
    block_tokens = _only("block sizes", {spec.block_size for spec in specs})
    page_bytes = _only("page sizes", {spec.page_size_bytes for spec in specs})
    hash_tokens = kv_cache_config.hash_block_size or block_tokens
    if hash_tokens != block_tokens:
        raise Refused(f"block hashes cover {hash_tokens} tokens, KV blocks {block_tokens}: make them equal")
    layers = _layers(kv_cache_config, specs)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    chunk_blocks = 1 << (max(1, chunk_tokens // block_tokens).bit_length() - 1)
    layout = LayoutFingerprint(
        engine=f"vllm {version}",
        attention=compat.attention_name(vllm_config, head_size=specs[0].head_size, block_tokens=block_tokens),
        layers=len(layers),
        page_bytes=page_bytes,
        block_tokens=block_tokens,
        packing=", ".join(sorted({_packing(spec, kv_cache_config) for spec in specs})),
        kv_groups=len(specs),
        ranks=ranks,
        chunk_blocks=chunk_blocks,
    )
    # Latents are the same on every rank: the first one writes them, all read them.
    shards = ranks if any(spec.head_size_v for spec in specs) else 1
    try:
        pages = PageLayout(layers=len(layers) * shards, page_bytes=page_bytes, chunk_blocks=chunk_blocks, shards=shards)
    except ValueError as error:
        raise Refused(f"tensor parallelism of {ranks} is not supported with {len(layers)} layers: {error}") from error
    hybrid = len(specs) > 1 or compat.has_window(specs[0])
    return Description(weights.content_of(vllm_config, block_tokens), layout, pages, layers, hybrid)


def view(kv_caches: Mapping[str, torch.Tensor], description: Description, num_blocks: int) -> tuple[torch.Tensor, ...]:
    """Each layer's (num_blocks, page bytes) of bytes, over the registered tensors' own memory.

    Layers that share another's cache have no pages of their own: the layer that writes it has them, and its hook comes
    when they are written. Raises Refused unless each page is dense, in the announced order and its own.
    """
    unknown = {layer.name for layer in description.layers} - set(kv_caches)
    if unknown:
        raise Refused(f"vLLM did not register KV caches that it announced: {', '.join(sorted(unknown))}")
    own: dict[tuple[int, _Where], str] = {}
    for layer in description.layers:
        other = own.setdefault((layer.group, _where(kv_caches[layer.name])), layer.name)
        if other != layer.name:
            raise Refused(f"{layer.name} and {other} are written to the same KV cache")
    known = {_where(kv_caches[layer.name]) for layer in description.layers}
    strange = sorted(name for name, cache in kv_caches.items() if _where(cache) not in known)
    if strange:
        raise Refused(f"vLLM registered KV caches that it did not announce: {', '.join(strange)}")
    return tuple(
        _pages_of(layer, kv_caches[layer.name], num_blocks, description.pages.page_bytes)
        for layer in description.layers
    )


def _where(cache: torch.Tensor) -> _Where:
    return cache.data_ptr(), tuple(cache.stride())


def _pages_of(layer: Layer, cache: torch.Tensor, num_blocks: int, page_bytes: int) -> torch.Tensor:
    import torch

    try:
        stride, content = orders.check(tuple(cache.shape), tuple(cache.stride()), num_blocks, layer.order)
    except Refused as error:
        raise Refused(f"{layer.name}: {error}") from error
    item = cache.element_size()
    stride_bytes, start_bytes = stride * item, cache.storage_offset() * item
    if content * item != layer.content_bytes:
        raise Refused(f"{layer.name}: a page has {content * item} bytes, not the {layer.content_bytes} announced")
    storage = cache.untyped_storage()
    if stride_bytes < page_bytes or start_bytes + (num_blocks - 1) * stride_bytes + page_bytes > storage.nbytes():
        raise Refused(f"{layer.name}: pages of {page_bytes} bytes overlap, or leave the cache ({stride_bytes} apart)")
    flat = torch.tensor([], dtype=torch.uint8, device=cache.device)
    return flat.set_(storage, start_bytes, (num_blocks, page_bytes), (stride_bytes, 1))


def _layers(kv_cache_config: KVCacheConfig, specs: list[AttentionSpec]) -> tuple[Layer, ...]:
    layers = [
        Layer(name, group, _order(spec, kv_cache_config), spec.unpadded_page_size_bytes)
        for group, spec in enumerate(specs)
        for name in kv_cache_config.kv_cache_groups[group].layer_names
    ]
    return tuple(sorted(layers, key=lambda layer: (compat.layer_index(layer.name), layer.name)))


def _order(spec: AttentionSpec, kv_cache_config: KVCacheConfig) -> str:
    return orders.announced(kv_cache_config.kv_cache_layout or PREFERRED_LAYOUT, heads=spec.num_heads)


def _packing(spec: AttentionSpec, kv_cache_config: KVCacheConfig) -> str:
    """What a page's bytes are, for comparison between engines."""
    kind = "K|V" if spec.head_size_v else "latent"
    padded = f" in {spec.page_size_bytes}" if spec.page_size_bytes != spec.unpadded_page_size_bytes else ""
    return (
        f"{_order(spec, kv_cache_config)} {kind} {spec.num_heads}x{spec.head_size} {compat.dtype_name(spec.dtype)}"
        + padded
    )


def _check_engine(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for what, size in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("decode context", parallel.decode_context_parallel_size),
        ("prefill context", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise Refused(f"{what} parallelism of {size} is not supported yet: run one engine per rank")
    if parallel.use_ubatching:
        # Each layer's hook would come once for every microbatch, and the first before the others are computed.
        raise Refused("microbatches (--enable-dbo, --ubatch-size) are not supported: unset them")
    if vllm_config.speculative_config is not None:
        raise Refused("speculative decoding is not supported yet: unset --speculative-config")
    if compat.turns_by_batch(vllm_config.model_config):
        raise Refused(
            "dynamic and longrope scaling are not supported with Transformers' implementation of a model: a block's "
            "keys would depend on the other prompts of a step; use vLLM's own, if it has one (--model-impl vllm)"
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in _PLAIN_CACHE_DTYPES:
        raise Refused(f"KV cache dtype {cache_dtype!r} is not supported: its scales do not travel")


def _checked(spec: object, is_draft: bool) -> AttentionSpec:
    known = compat.known_spec(spec)
    if known is None:
        raise Refused(
            f"KV caches of kind {type(spec).__name__} are not supported, only full attention, sliding windows and MLA"
        )
    if is_draft:
        raise Refused("KV caches of draft models are not supported")
    if getattr(known, "non_causal", False) or getattr(known, "non_causal_multi_token_decode", False):
        raise Refused("layers that look ahead are not supported: a block's KV would depend on what follows it")
    if known.kv_quant_mode.value or known.tokens_per_state != 1:
        raise Refused("quantized or compressed KV caches are not supported: a page is no plain K and V")
    return known


def _only(what: str, values: set[int]) -> int:
    if len(values) != 1:
        shown = " and ".join(str(value) for value in sorted(values))
        raise Refused(f"KV cache groups of different {what} ({shown}) are not supported")
    return values.pop()
