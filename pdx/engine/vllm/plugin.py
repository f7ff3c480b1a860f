"""Entry point of group `vllm.general_plugins`: makes `"kv_connector": "PdxConnector"` known, and has the weights of its
workers watched. Safe to call again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdx.engine.vllm.watch import Watch
    from pdx.engine.vllm.workers import Digest

NAME = "PdxConnector"


def register() -> None:
    """vLLM calls this in every one of its processes, before it looks up connectors and makes workers."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from pdx.engine.vllm import workers

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "pdx.engine.vllm.connector", NAME)
    workers.watch(NAME, begin=_begin, mark=_mark)


def _begin(digest: Digest) -> None:
    for watch in _watches():
        watch.begin(digest)


def _mark() -> None:
    for watch in _watches():
        watch.mark()


def _watches() -> list[Watch]:
    """Of this worker's connector, once it is there."""
    from pdx.engine.vllm.connector import PdxConnector
    from pdx.engine.vllm.workers import connectors

    return [connector.watch for connector in connectors() if isinstance(connector, PdxConnector)]
