"""What an engine's log and /metrics say of pdx: plain counters, from the worker to the API process."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

COUNTERS = {
    "pages_saved": "KV pages copied into the arena.",
    "bytes_saved": "Bytes of KV copied into the arena.",
    "pages_verified": "KV pages copied from the arena and verified.",
    "bytes_loaded": "Bytes of KV copied from the arena and verified.",
    "loads_ok": "Loads that were complete, by each rank of its own pages.",
    "loads_failed": "Loads after which KV had to be recomputed, wholly or in part; by each rank.",
    "generation_mismatches": "Pages whose slot changed hands while it was read.",
    "checksum_mismatches": "Pages whose checksum did not match.",
    "digest_mismatches": "Pages whose blake3 digest did not match.",
    "blocks_forgotten": "Blocks that could not be saved: some layers had forgotten them.",
    "too_large": "Requests and messages that pdx does not carry because of their size.",
    "messages_lost": "Messages to a daemon that was gone.",
}


class PdxStats(KVConnectorStats):
    """Counts since the last report, by the names in COUNTERS."""

    def reset(self) -> None:
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PdxPromMetrics(KVConnectorPromMetrics):
    """`vllm:pdx_<counter>` per engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(f"vllm:pdx_{name}", documentation, labelnames=self._labelnames),
                self.per_engine_labelvalues,
            )
            for name, documentation in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            if name in self._counters and count:
                self._counters[name][engine_idx].inc(count)
