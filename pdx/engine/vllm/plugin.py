"""Entry point of group `vllm.general_plugins`: makes `"kv_connector": "PdxConnector"` known. Safe to call again."""

from __future__ import annotations

NAME = "PdxConnector"


def register() -> None:
    """vLLM calls this in every one of its processes, before it looks up connectors."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "pdx.engine.vllm.connector", NAME)
