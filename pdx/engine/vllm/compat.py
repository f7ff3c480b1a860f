"""Every private import of vLLM and every branch on its version. A new vLLM means reading, then changing, this file
(and `pdx.chain`, which repeats its block hashes, and `workers`, which wraps methods of its workers).

Everything is imported inside the function that needs it: loading this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pdx.errors import Refused

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import AttentionSpec

SUPPORTED = (0, 32)
# Variables by which vLLM quantizes otherwise, or sends tokens to other experts than theirs.
OVERRIDING = (
    "VLLM_CPU_INT4_W4A8",
    "VLLM_HUMMING_INPUT_QUANT_CONFIG",
    "VLLM_HUMMING_ONLINE_QUANT_CONFIG",
    "VLLM_MARLIN_INPUT_DTYPE",
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
)


def check_version() -> str:
    """The installed version. Raises Refused outside the supported window."""
    import vllm

    if tuple(vllm.__version_tuple__[:2]) != SUPPORTED:
        major, minor = SUPPORTED
        raise Refused(f"found vLLM {vllm.__version__}; this pdx supports vLLM {major}.{minor}.x: install one of these")
    return vllm.__version__


def attention_name(vllm_config: VllmConfig, *, head_size: int, block_tokens: int) -> str:
    """What decides the packing inside a page: the kernels' family and, on CPUs, the instruction set.

    Raises Refused where vLLM runs on neither CPUs nor NVIDIA GPUs.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return _cpu_attention(vllm_config, head_size=head_size, block_tokens=block_tokens)
    if not current_platform.is_cuda():
        raise Refused(f"KV in {current_platform.device_type} memory is not supported: only the CPU's and NVIDIA's")
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        backend = get_attn_backend(
            head_size=head_size,
            dtype=model.dtype,
            kv_cache_dtype=vllm_config.cache_config.cache_dtype,
            use_mla=model.use_mla,
        )
    return backend.get_name()


def _cpu_attention(vllm_config: VllmConfig, *, head_size: int, block_tokens: int) -> str:
    from torch.cpu import _is_amx_tile_supported
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if vllm_config.model_config.use_mla:
        chosen = vllm_config.attention_config.backend
        return "AMX_MLA" if _is_amx_tile_supported() and chosen != AttentionBackendEnum.CPU_MLA else "CPU_MLA"
    isa = _get_attn_isa(vllm_config.model_config.dtype, block_tokens, head_size, vllm_config.cache_config.cache_dtype)
    return f"{CPUAttentionBackend.get_name()}/{isa}"


def tensor_parallel_rank() -> int:
    """Of this worker process, whose group vLLM has made by the time it constructs the connector."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()


def data_parallel_rank(vllm_config: VllmConfig) -> int | None:
    """Which one of the engines behind one HTTP server this is, as X-data-parallel-rank names it; None: the only one."""
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    assert transfer is not None
    assert transfer.engine_id is not None
    # vLLM appends this in every engine of several. Nothing else tells the first of them from one that is alone.
    if not transfer.engine_id.endswith(f"_dp{parallel.data_parallel_index}"):
        return None
    return parallel.data_parallel_rank_local if parallel.local_engines_only else parallel.data_parallel_index


def known_spec(spec: object) -> AttentionSpec | None:
    """A KV cache whose pages are plain rows of K|V or of latents; None for every other kind."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    # Subclasses store something else.
    return spec if type(spec) in (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec) else None


def has_window(spec: AttentionSpec) -> bool:
    """Whether vLLM frees blocks behind a window."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return isinstance(spec, SlidingWindowSpec)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rope_of(model: ModelConfig) -> str:
    """All that says how its keys are turned by their places."""
    return repr(getattr(model.hf_text_config, "rope_parameters", None))


def turns_by_batch(model: ModelConfig) -> bool:
    """Whether a key is turned by how long the longest prompt of its step is.

    Transformers' code does so where the scaling depends on a prompt's length; vLLM's own decides once for all prompts.
    """
    rope = rope_of(model)
    return ("dynamic" in rope or "longrope" in rope) and model.using_transformers_backend()


def config_source(model: ModelConfig) -> tuple[str, str | None]:
    """Where vLLM has read the model's configuration: a folder or a hub's name, and of that the revision."""
    return model.hf_config_path or model.model, model._hf_config_revision or model.revision


def overriding_environment() -> dict[str, object]:
    """What this process's environment changes in what a model computes."""
    from vllm import envs

    return {name: envs.environment_variables[name]() for name in OVERRIDING}  # read anew: vLLM changes what it has kept


def uses_another_hub() -> bool:
    """Whether models come from elsewhere than Hugging Face's hub, whose cache may have others by the same names."""
    from vllm import envs

    return bool(envs.VLLM_USE_MODELSCOPE)


def hash_seed(algorithm: str) -> str:
    """The seed of vLLM's block hashes. Raises Refused if it is random, so that no two engines could share a block."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import _NON_CRYPTO_HASH_FUNCTIONS, resolve_none_hash_seed

    function = get_hash_fn_by_name(algorithm)
    seed = resolve_none_hash_seed(function)
    if function in _NON_CRYPTO_HASH_FUNCTIONS and seed != resolve_none_hash_seed(function):
        raise Refused(
            f"block hashes of {algorithm!r} have a random seed: start engines with "
            "--prefix-caching-hash-algo sha256_cbor, or set PYTHONHASHSEED to one value everywhere"
        )
    return seed


def layer_index(layer_name: str) -> int:
    """The place of a layer in the model. Raises Refused for names without exactly one number."""
    from vllm.model_executor.models.utils import extract_layer_index

    try:
        return extract_layer_index(layer_name)
    except AssertionError as error:
        raise Refused(f"cannot tell the order of layers from the name {layer_name!r}") from error


def recompute_failed_loads(vllm_config: VllmConfig) -> None:
    """Makes vLLM recompute what could not be loaded. Its default answers such requests with an error.

    The scheduler of 0.32 reads the policy right after it has constructed its connector. What that was given may be a
    copy: see `plugin`.
    """
    assert vllm_config.kv_transfer_config is not None
    vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"


class OwnCache:
    """vLLM's blocks and its prefix cache, as `tainted` asks for them. Owned by the scheduler's thread."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager

    def blocks_of(self, request_id: str) -> set[int]:
        tables = self._manager.get_block_ids(request_id)
        return {block_id for table in tables for block_id in table if block_id}  # block 0 stands for none

    def named(self, request_id: str) -> int:
        groups = self._manager.coordinator.single_type_managers
        return sum(group.num_cached_block.get(request_id, 0) for group in groups)

    def forget(self, block_ids: Iterable[int] | None) -> None:
        """Those in use stay with their requests; only no other will find them."""
        pool = self._manager.block_pool
        pool.evict_blocks(set(range(pool.num_gpu_blocks) if block_ids is None else block_ids))
