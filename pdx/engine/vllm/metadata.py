"""The envelopes in which vLLM carries our `steps` between scheduler and worker. vLLM pickles them."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from pdx.engine.vllm.steps import Report, Step


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """Scheduler to worker, every step."""

    step: Step


@dataclass(frozen=True)
class ReportMetadata(KVConnectorWorkerMetadata):
    """Worker to scheduler, after timed steps, and those in which a load ended or weights were looked at.

    vLLM joins what ranks say.
    """

    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMetadata:
        assert isinstance(other, ReportMetadata)
        return ReportMetadata(self.report.joined(other.report))
