"""What of vLLM's KV caches is carried, seen as pages, or refused. Tensors are torch's own; no engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: its KV caches can't be described")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.config import ParallelConfig  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from vllm_engine import (  # noqa: E402
    BLOCK_TOKENS,
    BLOCKS,
    HEAD_SIZE,
    HEADS,
    LAYERS,
    NAMES,
    WINDOW,
    full_attention,
    hybrid_config,
    kv_cache_config,
    kv_tensors,
    sliding_window,
    vllm_config,
)

from pdx.engine.copier import Pages  # noqa: E402
from pdx.engine.vllm import caches, movers  # noqa: E402
from pdx.engine.vllm.caches import Description  # noqa: E402
from pdx.errors import Refused  # noqa: E402


@pytest.fixture(scope="module")
def describe(model_dir: Path) -> Callable[[KVCacheConfig], Description]:
    config = vllm_config(model_dir)
    return lambda cache_config: caches.describe(config, cache_config, chunk_tokens=256)


def on_host(views: Iterable[torch.Tensor]) -> list[Pages]:
    return [view.numpy() for view in views]


def latents(**more: Any) -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, **more)


def registered(cache_config: KVCacheConfig, layout: str) -> dict[str, torch.Tensor]:
    """The tensors that vLLM itself makes in this layout, of one group."""
    (group,), (tensor,) = cache_config.kv_cache_groups, cache_config.kv_cache_tensors
    page = group.kv_cache_spec.page_size_bytes
    between = KVCacheLayout[layout].is_block_outermost
    strides = {"layer_stride": page, "block_stride": LAYERS * page} if between else {}
    raw = torch.zeros(tensor.size, dtype=torch.int8)
    views = create_kv_cache_views(
        raw, group.kv_cache_spec, BLOCKS, KVCacheLayout[layout], replace(tensor, **strides), None
    )
    return dict(zip(tensor.layers, views, strict=True))


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
@pytest.mark.parametrize("kind", [full_attention, sliding_window, latents])
def test_pages_of_every_dense_layout_are_the_memory_of_one_block_in_one_layer(
    describe: Callable[[KVCacheConfig], Description], layout: str, kind: Callable[[], Any]
) -> None:
    cache_config = kv_cache_config(kind())
    cache_config.kv_cache_layout = layout
    description = describe(cache_config)
    tensors = registered(cache_config, layout)
    pages = on_host(caches.view(tensors, description, BLOCKS))
    assert list(description.numbered.number_of) == NAMES
    assert description.numbered.group_of == (0, 0, 0)
    assert [layer.shape for layer in pages] == [(BLOCKS, description.pages.page_bytes)] * LAYERS
    tensors[NAMES[2]][5] = 1.0
    assert pages[2][5].view("uint16").tolist() == [0x3F80] * (description.pages.page_bytes // 2)
    pages[2][5] = 0
    assert not any(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("layout", ["LHBNC", "BHLNC"])
def test_layouts_that_scatter_a_block_are_refused(
    describe: Callable[[KVCacheConfig], Description], layout: str
) -> None:
    cache_config = kv_cache_config()
    cache_config.kv_cache_layout = layout
    with pytest.raises(Refused, match=layout):
        describe(cache_config)


def test_engines_pair_when_a_page_s_bytes_have_one_order(describe: Callable[[KVCacheConfig], Description]) -> None:
    layouts = {}
    for name in ("LBHNC", "LBNHC", "BLHNC", "BLNHC"):
        cache_config = kv_cache_config()
        cache_config.kv_cache_layout = name
        layouts[name] = describe(cache_config).layout
    assert layouts["LBHNC"] == layouts["BLHNC"] != layouts["LBNHC"] == layouts["BLNHC"]
    assert layouts["LBHNC"].packing == f"HNC K|V {HEADS}x{HEAD_SIZE} bfloat16"
    assert describe(kv_cache_config(latents())).layout.packing == "NC latent 1x576 bfloat16"


def test_groups_share_pages_of_one_size(describe: Callable[[KVCacheConfig], Description]) -> None:
    cache_config = hybrid_config()
    description = describe(cache_config)
    assert (description.layout.kv_groups, description.pages.layers, description.hybrid) == (3, LAYERS, True)
    pages = on_host(caches.view(kv_tensors(cache_config), description, BLOCKS))
    assert description.numbered.group_of == (1, 2, 0)
    assert len({layer.ctypes.data for layer in pages}) == 1, "groups lie over the same memory"
    assert describe(kv_cache_config(sliding_window())).hybrid
    assert not describe(kv_cache_config()).hybrid
    assert not describe(kv_cache_config(full_attention(sliding_window=WINDOW))).hybrid, "vLLM keeps all its blocks"


def test_padding_travels_with_its_page(describe: Callable[[KVCacheConfig], Description]) -> None:
    plain = full_attention().page_size_bytes
    cache_config = kv_cache_config(full_attention(page_size_padded=plain + 512))
    description = describe(cache_config)
    assert description.pages.page_bytes == plain + 512
    tensors = registered(cache_config, "LBHNC")
    pages = on_host(caches.view(tensors, description, BLOCKS))
    tensors[NAMES[1]][7] = 1.0
    assert pages[1][7][:plain].all()
    assert not pages[1][7][plain:].any()
    with pytest.raises(Refused, match="overlap"):
        caches.view(registered(kv_cache_config(), "LBHNC"), description, BLOCKS)


def test_a_layer_that_shares_another_s_cache_has_no_pages(describe: Callable[[KVCacheConfig], Description]) -> None:
    """vLLM registers it, but it writes nothing: the other's hook comes when the pages are written."""
    description = describe(kv_cache_config())
    tensors = kv_tensors()
    sharing = tensors | {"model.layers.7.self_attn.attn": tensors[NAMES[1]]}
    assert len(caches.view(sharing, description, BLOCKS)) == LAYERS
    assert list(description.numbered.number_of) == NAMES


def test_caches_of_another_shape_are_refused(describe: Callable[[KVCacheConfig], Description]) -> None:
    description = describe(kv_cache_config())

    def refused(match: str, tensors: dict[str, torch.Tensor]) -> None:
        with pytest.raises(Refused, match=match):
            caches.view(tensors, description, BLOCKS)

    token_major = torch.zeros(BLOCKS, BLOCK_TOKENS, HEADS, 2 * HEAD_SIZE, dtype=torch.bfloat16).transpose(1, 2)
    refused("not dense", kv_tensors() | {NAMES[0]: token_major})
    refused("is not 40 blocks", kv_tensors() | {NAMES[0]: kv_tensors()[NAMES[0]][:-1]})
    refused("bytes, not the", kv_tensors() | {NAMES[0]: kv_tensors()[NAMES[0]].float()})
    aliased = kv_tensors()
    refused("written to the same", aliased | {NAMES[0]: aliased[NAMES[1]]})
    refused("did not announce: draft", kv_tensors() | {"draft.layers.0.attn": kv_tensors()[NAMES[0]]})
    refused("did not register", {name: tensor for name, tensor in kv_tensors().items() if name != NAMES[0]})


def test_memory_that_nothing_of_ours_copies_is_refused(describe: Callable[[KVCacheConfig], Description]) -> None:
    description = describe(kv_cache_config())
    elsewhere = [torch.zeros(BLOCKS, description.pages.page_bytes, dtype=torch.uint8, device="meta")] * LAYERS
    with pytest.raises(Refused, match="meta memory"):
        movers.mover_of(elsewhere, description.pages, None, shard=0, folder=Path("unused"))


def test_engines_of_more_ranks_are_described_as_a_whole(model_dir: Path) -> None:
    config = vllm_config(model_dir)
    alone = caches.describe(config, kv_cache_config(), chunk_tokens=256)
    config.parallel_config = ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="mp")
    two = caches.describe(config, kv_cache_config(), chunk_tokens=256)
    assert (two.layout.ranks, two.layout.layers, two.pages.layers, two.pages.shards) == (2, LAYERS, 2 * LAYERS, 2)
    assert two.content == alone.content, "the same tokens mean the same"
    assert two.layout != alone.layout, "but never pair"
    latent = caches.describe(config, kv_cache_config(latents()), chunk_tokens=256)
    assert (latent.layout.ranks, latent.pages.layers, latent.pages.shards) == (2, LAYERS, 1), "equal on all ranks"


def test_equal_engines_describe_themselves_equally_and_others_do_not(model_dir: Path, tmp_path: Path) -> None:
    one, two = (caches.describe(vllm_config(model_dir), kv_cache_config(), chunk_tokens=256) for _ in range(2))
    assert one == two
    assert one.pages.chunk_blocks == 8
    assert one.layout.attention.startswith("CPU_ATTN/")
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copied = caches.describe(vllm_config(tmp_path), kv_cache_config(), chunk_tokens=256)
    assert copied.content.weights == one.content.weights
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"c")
    assert caches.describe(vllm_config(tmp_path), kv_cache_config(), chunk_tokens=256).content != copied.content


@pytest.mark.parametrize(
    ("match", "cache_config"),
    [
        ("MambaSpec", lambda: kv_cache_config(MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,)))),
        (
            "ChunkedLocalAttentionSpec",
            lambda: hybrid_config(
                full_attention(), sliding_window(),
                ChunkedLocalAttentionSpec(
                    block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16,
                    attention_chunk_size=64,
                ),
            ),
        ),
        (
            "UniformTypeKVCacheSpecs",
            lambda: KVCacheConfig(
                num_blocks=BLOCKS, kv_cache_tensors=[],
                kv_cache_groups=[
                    KVCacheGroupSpec(
                        NAMES, UniformTypeKVCacheSpecs(block_size=BLOCK_TOKENS, kv_cache_specs={NAMES[0]: latents()})
                    )
                ],
            ),
        ),
        ("different block sizes .32 and 64.", lambda: hybrid_config(
            full_attention(), sliding_window(), replace(sliding_window(), block_size=64, head_size=HEAD_SIZE // 2)
        )),
        ("different page sizes", lambda: hybrid_config(full_attention(), sliding_window(), latents())),
        ("no KV cache", lambda: KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[])),
        ("compressed", lambda: kv_cache_config(latents(tokens_per_state=4))),
        ("look ahead", lambda: kv_cache_config(full_attention(non_causal=True))),
    ],
)  # fmt: skip
def test_caches_that_can_not_be_carried_are_refused_by_name(
    describe: Callable[[KVCacheConfig], Description], match: str, cache_config: Callable[[], KVCacheConfig]
) -> None:
    with pytest.raises(Refused, match=match):
        describe(cache_config())


def test_draft_models_and_finer_hashes_are_refused(describe: Callable[[KVCacheConfig], Description]) -> None:
    drafted = kv_cache_config()
    drafted.kv_cache_groups[0].is_eagle_group = True
    with pytest.raises(Refused, match="draft"):
        describe(drafted)
    finer = kv_cache_config()
    finer.hash_block_size = 16
    with pytest.raises(Refused, match="hashes cover 16"):
        describe(finer)


@pytest.mark.parametrize(
    ("rope", "transformers", "refused"),
    [("dynamic", True, True), ("longrope", True, True), ("yarn", True, False), ("dynamic", False, False)],
)
def test_keys_that_depend_on_other_prompts_are_refused(
    model_dir: Path, rope: str, *, transformers: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vllm_config(model_dir)
    config.model_config.hf_text_config.rope_parameters = {"rope_type": rope, "factor": 2.0}
    monkeypatch.setattr(type(config.model_config), "using_transformers_backend", lambda model: transformers)
    with pytest.raises(Refused, match="other prompts of a step") if refused else nullcontext():
        caches.describe(config, kv_cache_config(), chunk_tokens=256)


def test_engines_that_can_not_be_carried_are_refused(model_dir: Path) -> None:
    config = vllm_config(model_dir)
    config.cache_config.cache_dtype = "fp8"
    with pytest.raises(Refused, match="fp8"):
        caches.describe(config, kv_cache_config(), chunk_tokens=256)
    config.cache_config.cache_dtype = "auto"
    config.parallel_config = ParallelConfig(pipeline_parallel_size=2, distributed_executor_backend="mp")
    with pytest.raises(Refused, match="pipeline parallelism"):
        caches.describe(config, kv_cache_config(), chunk_tokens=256)
    config.parallel_config = ParallelConfig(ubatch_size=2)
    with pytest.raises(Refused, match="microbatches"):
        caches.describe(config, kv_cache_config(), chunk_tokens=256)
    config.parallel_config = ParallelConfig(tensor_parallel_size=16, distributed_executor_backend="mp")
    with pytest.raises(Refused, match="tensor parallelism of 16"):
        caches.describe(config, kv_cache_config(), chunk_tokens=256)
