"""A torch engine attached to a real pdxd, as vLLM's processes are: one connection of the scheduler and of each rank."""

from __future__ import annotations

from collections.abc import Callable

from torch_engine import BLOCK_TOKENS, LAYERS, NUMBERED, Request, TorchEngine, layout_of

from pdx.client import Attachment, DaemonClient
from pdx.config import Config, Offload
from pdx.engine.host_mover import HostMover
from pdx.engine.link import Link
from pdx.engine.mover import Mover
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.wire import Attach, DaemonRef, EngineInfo, Role

MoverOf = Callable[[TorchEngine, int, DaemonClient | None], Mover]  # for this rank
CONTENT = ContentFingerprint(
    model="torch", weights="seed 7", weight_epoch="", dtype="f64", block_tokens=BLOCK_TOKENS, hash_algorithm="sha256"
)


class TorchPeer:
    """Attached when constructed; attaches again by itself when its daemon died. One thread only."""

    def __init__(
        self,
        engine: TorchEngine,
        config: Config,
        name: str,
        role: Role,
        *,
        mover_of: MoverOf | None = None,
        offload: Offload = "off",
    ) -> None:
        """`mover_of`: for an engine whose pages are not in host memory."""
        self.engine = engine
        self.name = name
        layout, ranks = layout_of(engine.shards), engine.ranks
        fingerprint = LayoutFingerprint(
            engine="torch 1", attention="paged", layers=LAYERS, page_bytes=layout.page_bytes,
            block_tokens=BLOCK_TOKENS, packing="", kv_groups=1, ranks=ranks, chunk_blocks=1,
        )  # fmt: skip
        info = EngineInfo(engine_id=name, role=role, model="torch", content=CONTENT, layout=fingerprint)
        hellos = [
            Attach(kind="scheduler", engine=info),
            *(Attach(kind="worker", engine=info, pages=layout, rank=rank) for rank in range(ranks)),
        ]
        self._links = [Link(Attachment(config, hello)) for hello in hellos]
        clients = [link.client() for link in self._links]
        workers = []
        for rank, link in enumerate(self._links[1:]):
            mover: Mover = (
                HostMover(engine.pages(rank), layout, shard=layout.shard_of_rank(rank))
                if mover_of is None
                else mover_of(engine, rank, clients[1 + rank])
            )
            workers.append(WorkerSide(link, NUMBERED, layout, mover, watch=engine.watches[rank], rank=rank))
        self._scheduler = SchedulerSide(
            self._links[0], role=role, layout=layout, block_tokens=BLOCK_TOKENS, ranks=ranks, offload=offload
        )
        self._workers = workers
        engine.connect(self._scheduler, *workers)

    @property
    def clients(self) -> list[DaemonClient | None]:
        """Of the scheduler, then of the workers; None: no daemon now."""
        return [link.client() for link in self._links]

    @property
    def daemon_ref(self) -> DaemonRef | None:
        """The daemon that all are attached to, if they are to one."""
        refs = [client.attached.daemon for client in self.clients if client is not None]
        return refs[0] if len(refs) == len(self._links) and all(ref == refs[0] for ref in refs) else None

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
        self._scheduler.close()
        for worker in self._workers:
            worker.close()
