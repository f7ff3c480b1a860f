"""vLLM's own scheduler with both roles of the connector, and a forward pass that writes KV we can recognize."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from pdx.engine.vllm import compat, plugin
from pdx.engine.vllm.metadata import StepMetadata

LAYERS, HEADS, HEAD_SIZE, BLOCK_TOKENS, BLOCKS = 3, 2, 32, 32, 40
WINDOW = 65  # of the hybrid's first two layers; the window of a token may begin with the last one of a block
HASHING = "sha256_cbor"
plugin.register()
NAMES = [f"model.layers.{n}.self_attn.attn" for n in range(LAYERS)]


def write_model(folder: Path) -> Path:
    """A model folder as far as configurations read it."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_SIZE,
        "vocab_size": 256, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    return folder


def vllm_config(model_dir: Path, role: str = "kv_both", *, prefix_caching: bool = True, **extra: Any) -> VllmConfig:
    cache_config = CacheConfig(
        block_size=BLOCK_TOKENS, enable_prefix_caching=prefix_caching, prefix_caching_hash_algo=HASHING
    )
    cache_config.num_gpu_blocks = BLOCKS
    return VllmConfig(
        model_config=ModelConfig(model=str(model_dir), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024),
        cache_config=cache_config,
        scheduler_config=SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=64, max_model_len=1024, is_encoder_decoder=False
        ),
        device_config=DeviceConfig(device="cpu"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="MemoryConnector",
            kv_connector_module_path="memory_connector",
            kv_role=role,  # type: ignore[arg-type]
            kv_connector_extra_config=extra,
        ),
    )


def full_attention(**more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16, **more
    )


def sliding_window(**more: Any) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16, sliding_window=WINDOW,
        **more,
    )  # fmt: skip


def kv_cache_config(spec: Any = None) -> KVCacheConfig:
    """One group of all layers, each layer with memory of its own."""
    spec = spec or full_attention()
    page = spec.page_size_bytes
    tensors = [KVCacheTensor(size=LAYERS * BLOCKS * page, layers=NAMES, layer_stride=BLOCKS * page, block_stride=page)]
    return KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=tensors,
        kv_cache_groups=[KVCacheGroupSpec(NAMES, spec)],
        hash_block_size=BLOCK_TOKENS,
    )


def hybrid_config(*specs: Any) -> KVCacheConfig:
    """A group for each layer, all over the same memory: full attention in the last layer, a window in the others."""
    specs = specs or (full_attention(), sliding_window(), sliding_window())
    page = specs[0].page_size_bytes
    order = [NAMES[-1], *NAMES[:-1]]
    return KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[
            KVCacheTensor(size=BLOCKS * page, layers=[name], layer_stride=BLOCKS * page, block_stride=page)
            for name in order
        ],
        kv_cache_groups=[KVCacheGroupSpec([name], spec) for name, spec in zip(order, specs, strict=True)],
        hash_block_size=BLOCK_TOKENS,
    )


def kv_tensors(cache_config: KVCacheConfig | None = None) -> dict[str, torch.Tensor]:
    """Per-layer views of one allocation, as vLLM makes them; named out of order on purpose."""
    groups = len(cache_config.kv_cache_groups) if cache_config else 1
    backing = torch.zeros(LAYERS // groups, BLOCKS, HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE, dtype=torch.bfloat16)
    return {name: backing[n // groups] for n, name in reversed(list(enumerate(NAMES)))}


class Engine:
    """vLLM's scheduler and both roles of the connector; a forward pass that writes recognizable KV."""

    def __init__(self, model_dir: Path, role: str, cache_config: KVCacheConfig | None = None, **settings: Any) -> None:
        config, cache_config = vllm_config(model_dir, role, **settings), cache_config or kv_cache_config()
        self._groups = [(group.layer_names, group.kv_cache_spec) for group in cache_config.kv_cache_groups]
        self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache_config)
        self.tensors = kv_tensors(cache_config)
        self.worker.register_kv_caches(self.tensors)
        self.weights = "weights"
        self.worker.watch.begin(lambda: self.weights)
        self.scheduler = Scheduler(
            config, cache_config, StructuredOutputManager(config), BLOCK_TOKENS, hash_block_size=BLOCK_TOKENS,
            log_stats=True,
        )  # fmt: skip
        hashing = get_hash_fn_by_name(HASHING)
        init_none_hash(hashing)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, hashing)
        self.outputs: list[Any] = []
        self.counts: Counter[str] = Counter()  # pdx's own, as they reach vLLM's metrics
        self.hooked = 0  # layers whose hooks were called

    def add(
        self,
        name: str,
        tokens: list[int],
        parameters: dict[str, Any],
        *,
        max_tokens: int = 1,
        adapter: LoRARequest | None = None,
    ) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, extra_args={"kv_transfer_params": parameters})
        request = Request(name, tokens, sampling, None, block_hasher=self._hasher, lora_request=adapter)
        self.scheduler.add_request(request)
        return request

    def step(self) -> SchedulerOutput:
        """One step in the order of vLLM's V1 model runner. Metadata is pickled, as between its processes."""
        scheduled = self.scheduler.schedule()
        metadata = pickle.loads(pickle.dumps(scheduled.kv_connector_metadata))
        assert isinstance(metadata, StepMetadata)
        worker = self.worker
        worker.handle_preemptions(metadata)
        worker.bind_connector_metadata(metadata)
        if scheduled.total_num_scheduled_tokens:
            self._forward(scheduled)
        worker.start_load_kv(None)  # type: ignore[arg-type]
        worker.wait_for_save()
        results = worker.get_transfer_results(scheduled.finished_req_ids)
        output = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_stats=worker.get_kv_connector_stats(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        self._update(scheduled, output)
        return scheduled

    def run(self, *, steps: int = 50) -> list[SchedulerOutput]:
        scheduled = []
        for _ in range(steps):
            if not self.scheduler.has_requests():
                return scheduled
            scheduled.append(self.step())
        raise AssertionError(f"not done after {steps} steps")

    def holds(self, request: Request, tokens: int) -> bool:
        """Whether a next token finds the KV that `_forward` writes, in every layer, as far as it looks back."""
        return all(
            torch.equal(self._row(name, blocks, position), self._kv(name, request.all_token_ids[position], position))
            for name, blocks, window in self._tables(request.request_id)
            for position in range(max(0, tokens - window + 1), tokens)
        )

    def _tables(self, request_id: str) -> Iterator[tuple[str, list[int], int]]:
        """(layer name, its blocks, how far a token looks back, itself included), in model order."""
        tables = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        layers = [
            (name, blocks, getattr(spec, "sliding_window", None) or 1 << 30)
            for blocks, (names, spec) in zip(tables, self._groups, strict=True)
            for name in names
        ]
        yield from sorted(layers, key=lambda layer: compat.layer_index(layer[0]))

    def _forward(self, scheduled: SchedulerOutput) -> None:
        spans = {}
        for request_id, count in scheduled.num_scheduled_tokens.items():
            end = self.scheduler.requests[request_id].num_computed_tokens  # vLLM has advanced it already
            spans[request_id] = range(end - count, end)
            assert self.holds(self.scheduler.requests[request_id], end - count), "it would attend to something else"
        for name in reversed(self.tensors):  # in model order
            hooked = self.worker.has_connector_metadata()
            if hooked:
                self.worker.wait_for_layer_load(name)
            for request_id, span in spans.items():
                request = self.scheduler.requests[request_id]
                blocks = next(blocks for layer, blocks, _ in self._tables(request_id) if layer == name)
                for position in span:
                    row = self._kv(name, request.all_token_ids[position], position)
                    self._row(name, blocks, position)[:] = row
            if hooked:
                self.worker.save_kv_layer(name, self.tensors[name], None)  # type: ignore[arg-type]
                self.hooked += 1

    def _row(self, name: str, blocks: list[int], position: int) -> torch.Tensor:
        block = blocks[position // BLOCK_TOKENS]
        assert block, "vLLM's null block"
        return self.tensors[name][block, :, position % BLOCK_TOKENS]

    def _kv(self, layer_name: str, token: int, position: int) -> torch.Tensor:
        start = token + 3 * position + 100 * compat.layer_index(layer_name)
        return (torch.arange(start, start + HEADS * 2 * HEAD_SIZE) % 251).to(torch.bfloat16).view(HEADS, -1)

    def _update(self, scheduled: SchedulerOutput, output: KVConnectorOutput) -> None:
        ids = list(scheduled.num_scheduled_tokens)
        sampled = []
        for request_id in ids:
            request = self.scheduler.requests[request_id]
            sampled.append([7] if request.num_computed_tokens >= request.num_tokens else [])
        runner_output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: n for n, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=output,
        )
        for outputs in self.scheduler.update_from_output(scheduled, runner_output).values():
            self.outputs += outputs.outputs
            stats = outputs.scheduler_stats
            self.counts.update(stats.kv_connector_stats or {} if stats else {})
