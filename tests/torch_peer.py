"""A torch engine attached to a real pdxd, as vLLM's two processes are: one connection of each half of the connector."""

from __future__ import annotations

from torch_engine import BLOCK_TOKENS, LAYERS, LAYOUT, Request, TorchEngine

from pdx.client import Attachment, DaemonClient
from pdx.config import Config
from pdx.engine.link import Link
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.wire import Attach, DaemonRef, EngineInfo, Role

CONTENT = ContentFingerprint(
    model="torch", weights="seed 7", weight_epoch=0, dtype="f64", block_tokens=BLOCK_TOKENS, hash_algorithm="sha256"
)
PACKING = LayoutFingerprint(
    engine="torch 1", attention="paged", layers=LAYERS, page_bytes=LAYOUT.page_bytes, block_tokens=BLOCK_TOKENS,
    packing="", kv_groups=1, ranks=1,
)  # fmt: skip


class TorchPeer:
    """Attached when constructed; attaches again by itself when its daemon died. One thread only."""

    def __init__(self, engine: TorchEngine, config: Config, name: str, role: Role) -> None:
        self.engine = engine
        self.name = name
        info = EngineInfo(engine_id=name, role=role, model="torch", content=CONTENT, layout=PACKING)
        self._links = [
            Link(Attachment(config, Attach(kind="scheduler", engine=info))),
            Link(Attachment(config, Attach(kind="worker", engine=info, pages=LAYOUT))),
        ]
        for link in self._links:
            link.client()
        scheduler = SchedulerSide(self._links[0], role=role, layout=LAYOUT, block_tokens=BLOCK_TOKENS)
        engine.connect(scheduler, WorkerSide(self._links[1], engine.pages(), LAYOUT))

    @property
    def clients(self) -> list[DaemonClient | None]:
        """Of both halves; None: no daemon now."""
        return [link.client() for link in self._links]

    @property
    def daemon_ref(self) -> DaemonRef | None:
        """The daemon that both halves are attached to, if they are to one."""
        refs = [client.attached.daemon for client in self.clients if client is not None]
        return refs[0] if len(refs) == 2 and refs[0] == refs[1] else None

    def send(self, name: str, tokens: list[int], handle: str) -> Request:
        parameters = {"do_remote_decode": True, "pdx_handle": handle}
        return self.engine.add(Request(name, tokens, parameters))

    def load(
        self,
        name: str,
        tokens: list[int],
        handle: str,
        *,
        max_tokens: int = 5,
        covered: int | None = None,
        early: bool = False,
    ) -> Request:
        """`covered`: how many of the tokens the handoff carries. `early`: prefill has not answered yet."""
        parameters = {"do_remote_prefill": True, "pdx_handle": handle, "pdx_early": early}
        parameters["pdx_tokens"] = len(tokens) if covered is None else covered
        return self.engine.add(Request(name, tokens, parameters, max_tokens=max_tokens))

    def close(self) -> None:
        for link in self._links:
            link.close()
