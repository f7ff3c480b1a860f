"""Entry point of group `vllm.general_plugins`: makes `"kv_connector": "PdxConnector"` known, has the weights of its
workers watched, and failed loads recomputed. Safe to call again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from pdx.engine.vllm.watch import Watch
    from pdx.engine.vllm.workers import Digest

NAME = "PdxConnector"
RECOMPUTES = "pdx_recomputes"


def register() -> None:
    """vLLM calls this in every one of its processes, before it looks up connectors and makes workers."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from pdx.engine.vllm import workers

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "pdx.engine.vllm.connector", NAME)
    workers.watch(NAME, begin=_begin, mark=_mark)
    _recompute_failed_loads()


def _recompute_failed_loads() -> None:
    """Also inside vLLM's MultiConnector, where ours gets a copy of the configuration that the scheduler reads."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from pdx.engine.vllm import compat, workers

    made = KVConnectorFactory.create_connector
    if hasattr(made, RECOMPUTES):
        return

    @functools.wraps(made)
    def create(config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        if NAME in workers.connector_names(config):
            compat.recompute_failed_loads(config)
        return made(config, *args, **kwargs)

    setattr(create, RECOMPUTES, True)
    KVConnectorFactory.create_connector = staticmethod(create)


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
