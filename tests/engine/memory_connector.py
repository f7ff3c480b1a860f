"""PdxConnector attached to a daemon in memory. vLLM loads it by module path, as it would any connector."""

from __future__ import annotations

from memory_daemon import MemoryAttachment, MemoryDaemon

from pdx.engine.link import Link
from pdx.engine.vllm.connector import PdxConnector


class MemoryConnector(PdxConnector):
    """Only `_link` differs. The daemon is made by the first engine, which knows the layout."""

    daemon: MemoryDaemon | None = None

    def _link(self, kind: str) -> Link:
        if MemoryConnector.daemon is None:
            MemoryConnector.daemon = MemoryDaemon(self._description.pages, blocks=64, digest_mode=True)
        link = Link(MemoryAttachment(MemoryConnector.daemon))  # type: ignore[arg-type]
        link.client()
        return link


def the_daemon() -> MemoryDaemon:
    """The one that the engines of this test share."""
    assert MemoryConnector.daemon is not None
    return MemoryConnector.daemon
