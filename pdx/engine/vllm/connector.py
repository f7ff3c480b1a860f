"""The class that vLLM loads: dispatches each hook to the half that runs in this process, and does nothing else.

Imported in API, scheduler and worker processes alike, so importing must cost little and start nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from pdx.client import Attachment
from pdx.engine.link import Link
from pdx.engine.vllm import caches, compat, movers, settings, workers
from pdx.engine.vllm.adapters import Adapters
from pdx.engine.vllm.metadata import ReportMetadata, StepMetadata
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.steps import Report
from pdx.engine.vllm.watch import Watch
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.wire import Attach, EngineInfo

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class PdxConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance per role and process. Raises Refused or ConfigError, in one sentence, for what can't work."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.check_version()
        compat.recompute_failed_loads(vllm_config)
        if role is KVConnectorRole.WORKER:
            workers.check_watched()
        self.watch = Watch()  # over this process's weights: `plugin` gives it the worker's model
        self._settings = settings.read(vllm_config)
        self._description = caches.describe(
            vllm_config, kv_cache_config, chunk_tokens=self._settings.config.chunk_tokens
        )
        lora = vllm_config.lora_config
        self._adapters = Adapters(self._settings.adapters, modules=lora.target_modules if lora else None)
        self._shares = settings.shares(vllm_config)
        self._scheduler_side: SchedulerSide | None = None
        self._worker_side: WorkerSide | None = None
        self._report: Report | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler_side = SchedulerSide(
                self._link("scheduler"),
                role=self._settings.role,
                layout=self._description.pages,
                block_tokens=self._description.layout.block_tokens,
                ranks=self._description.layout.ranks,
                hybrid=self._description.hybrid,
                adapters=self._adapters,
                offload=settings.offload_of(self._settings.config, vllm_config),
                shares=self._shares,
                lookup_s=self._settings.config.lookup_s,
            )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return caches.PREFERRED_LAYOUT

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        """No: pages leave their blocks within the step that computes them, so a preemption takes nothing with it."""
        return False

    # --- worker -----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        description, rank = self._description, self._rank
        views = caches.view(kv_caches, description, self._kv_cache_config.num_blocks)
        link, pages = self._link("worker"), description.pages
        folder = self._settings.config.run_path / "kernels"
        mover = movers.mover_of(views, pages, link.client(), shard=pages.shard_of_rank(rank), folder=folder)
        self._worker_side = WorkerSide(link, description.numbered, pages, mover, watch=self.watch, rank=rank)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self._worker.begin(connector_metadata.step)

    def has_connector_metadata(self) -> bool:
        """Asked at each layer of a forward pass: whether its hooks, which only save, have anything to do."""
        return self._worker_side is not None and self._worker_side.saves

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._worker.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request is scheduled only after all of its layers have come."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        self._worker.save_layer(layer_name)

    def wait_for_save(self) -> None:
        self._worker.end()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        self._report = self._worker.take_ended()
        loads = self._report.loads if self._report else {}
        # Where vLLM allows it, blocks that failed are named one by one: `failed_recving` throws the good ones away too.
        failed = {request_id for request_id, result in loads.items() if not result.ok}
        return KVConnectorTransferResults(
            finished_recving=set(loads), failed_recving=failed if self._description.hybrid else set()
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid = self._worker.take_invalid()
        return set() if self._description.hybrid else invalid

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return ReportMetadata(self._report) if self._report else None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        from pdx.engine.vllm.stats import PdxStats

        # vLLM asks both roles' connectors.
        side = self._worker_side or self._scheduler_side
        counts = side.take_counts() if side is not None else {}
        return PdxStats(counts) if counts else None

    # --- scheduler --------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.matched_tokens(request.request_id, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.allocated(request.request_id, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return StepMetadata(self._scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, ReportMetadata):
            self._scheduler.reported(metadata.report)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        # Never delayed: what was to be saved has left its blocks, and blocks under a load are kept by vLLM itself.
        result = self._scheduler.finished(request.request_id)
        return False, {"pdx": result} if result else None

    def reset_cache(self) -> bool:
        return self._scheduler.reset()

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind(compat.OwnCache(kv_cache_manager))

    # --- both -------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        for side in (self._scheduler_side, self._worker_side):
            if side is not None:
                side.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        from pdx.engine.vllm.stats import PdxStats

        return PdxStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        from pdx.engine.vllm.stats import PdxPromMetrics

        return PdxPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _worker(self) -> WorkerSide:
        assert self._worker_side is not None, "register_kv_caches was not called"
        return self._worker_side

    @property
    def _scheduler(self) -> SchedulerSide:
        assert self._scheduler_side is not None, "this is the worker's connector"
        return self._scheduler_side

    @property
    def _rank(self) -> int:
        """Of this worker."""
        return compat.tensor_parallel_rank() if self._description.layout.ranks > 1 else 0

    def _link(self, kind: str) -> Link:
        """Attached when this returns. All processes describe the engine alike: the daemon compares."""
        chosen, description = self._settings, self._description
        info = EngineInfo(
            engine_id=chosen.engine_id,
            role=chosen.role,
            model=description.content.model,
            url=chosen.url,
            data_parallel_rank=chosen.data_parallel_rank,
            reasoning_parser=chosen.reasoning_parser,
            context_tokens=chosen.context_tokens,
            sampling_defaults=chosen.sampling_defaults,
            adapters=self._adapters.digests,
            shares_blocks=self._shares,
            content=description.content,
            layout=description.layout,
        )
        if kind == "worker":
            hello = Attach(kind="worker", engine=info, pages=description.pages, rank=self._rank)
        else:
            hello = Attach(kind="scheduler", engine=info, router=chosen.config.router)
        link = Link(Attachment(chosen.config, hello))
        link.client()
        return link
