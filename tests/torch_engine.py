"""A small engine with real paged attention, for tests of the connector without vLLM.

A random two-matrix transformer in float64 writes K and V of each layer into pages of a paged cache and attends through
block tables. It has what matters to a KV connector: chunked prefill, several requests a step, a prefix cache whose
blocks may be computed by a neighbour in the same step, preemption, a hook after each layer's attention, and loads that
end some steps later. Steps call the connector's two halves in vLLM's order. Of several ranks each keeps K and V of its
own heads, and what they report is joined as vLLM joins it.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pdx.engine.copier import Pages
from pdx.engine.vllm.caches import Layers
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.steps import Report
from pdx.engine.vllm.watch import Watch
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.layout import PageLayout, blocks_for

LAYERS, HEADS, HEAD_SIZE, VOCABULARY = 3, 2, 8, 97
WIDTH = HEADS * HEAD_SIZE
BLOCK_TOKENS = 4
NUMBERED = Layers({f"layer.{layer}": layer for layer in range(LAYERS)}, (0,) * LAYERS)


def layout_of(shards: int) -> PageLayout:
    page_bytes = BLOCK_TOKENS * 2 * WIDTH // shards * 8
    return PageLayout(layers=shards * LAYERS, page_bytes=page_bytes, chunk_blocks=4, shards=shards)


LAYOUT = layout_of(1)


@dataclass(eq=False)
class Request:
    """The attributes of vLLM's Request that a connector reads, and this engine's own."""

    request_id: str
    prompt_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None = None
    max_tokens: int = 1
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    lora_request: Any = None
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    num_computed_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    status: str = "waiting"  # waiting, loading, running, finished
    scores: list[float] = field(default_factory=list)  # of each token of the answer: tells KV apart where tokens don't
    result: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.block_hashes: list[bytes] = []
        for token in self.prompt_token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if len(self.tokens) % BLOCK_TOKENS == 0:
            parent = self.block_hashes[-1] if self.block_hashes else (self.cache_salt or "").encode()
            self.block_hashes.append(hashlib.sha256(parent + bytes(self.tokens[-BLOCK_TOKENS:])).digest())

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt_token_ids) :]


@dataclass
class Scheduled:
    """The attributes of vLLM's SchedulerOutput that a connector reads; it is its own block state."""

    num_scheduled_tokens: dict[str, int]
    requests: dict[str, Request]
    preempted_req_ids: set[str] | None = None

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())

    @property
    def kv_connector_block_state(self) -> Scheduled:
        return self

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return (self.requests[request_id].block_ids,)


class Model:
    """Weights; equal seeds give equal models. The engine computes, and keeps its cache, where they are."""

    def __init__(self, seed: int = 7, device: str = "cpu") -> None:
        torch.set_num_threads(1)  # several would wait for each other most of the time, over matrices so small
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=generator)
        self.mix = torch.randn(LAYERS, WIDTH, 3 * WIDTH, dtype=torch.float64, generator=generator) / WIDTH**0.5
        self.out = torch.randn(LAYERS, WIDTH, WIDTH, dtype=torch.float64, generator=generator) / WIDTH**0.5
        self.embedding, self.mix, self.out = (each.to(device) for each in (self.embedding, self.mix, self.out))

    def digest(self) -> str:
        """Of the weights, whatever they are now."""
        tensors = (self.embedding, self.mix, self.out)
        return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()[:32]


class TorchEngine:
    """One engine. `step` does what one turn of vLLM's loop does."""

    def __init__(
        self,
        model: Model,
        *,
        blocks: int = 128,
        tokens_a_step: int = 10,
        prefix_caching: bool = True,
        ranks: int = 1,
        alike: bool = False,
    ) -> None:
        """`alike`: every rank keeps K and V of all heads, as with MLA, and attends to its own heads only."""
        self.model = model
        self.tokens_a_step = tokens_a_step
        self.ranks = ranks
        self.shards = 1 if alike else ranks
        self.stalled: set[int] = set()  # ranks that do not come to their loads in this step
        self.requests: dict[str, Request] = {}
        shape = (ranks, LAYERS, blocks, BLOCK_TOKENS, 2, WIDTH // self.shards)
        self.caches = torch.zeros(shape, dtype=torch.float64, device=model.embedding.device)
        self.watches = [Watch() for _ in range(ranks)]
        for watch in self.watches:
            watch.begin(lambda: self.model.digest())
        self.scheduler: SchedulerSide | None = None
        self.workers: tuple[WorkerSide, ...] = ()
        self.forward_tokens = 0
        self._prefix_caching = prefix_caching
        self._free = list(range(blocks - 1, 0, -1))  # block 0 is the null block
        self._users = dict.fromkeys(range(blocks), 0)
        self._cached: dict[bytes, int] = {}
        self._named: dict[str, int] = {}  # request -> how many of its blocks have been cached
        self._preempted: set[str] = set()  # since the last step
        self._invalid: set[int] = set()  # blocks of loads that some rank has not ended yet
        self._reported: Counter[str] = Counter()  # ranks that have ended a load

    def pages(self, rank: int = 0) -> tuple[Pages, ...]:
        """Byte views of a rank's cache, by layer. Of a cache on a device they are copies."""
        return tuple(view.cpu().numpy() for view in self.byte_views(rank))

    def byte_views(self, rank: int = 0) -> list[torch.Tensor]:
        return [layer.view(torch.uint8).flatten(1) for layer in self.caches[rank]]

    def connect(self, scheduler: SchedulerSide, *workers: WorkerSide) -> None:
        assert len(workers) == self.ranks
        scheduler.bind(self)
        self.scheduler, self.workers = scheduler, workers

    def update(self, model: Model) -> None:
        """New weights in all ranks, between two steps. Whoever updates forgets the engine's own cache, or does not."""
        self.model = model
        for watch in self.watches:
            watch.mark()

    def add(self, request: Request) -> Request:
        self.requests[request.request_id] = request
        if self.scheduler:
            self.scheduler.on_new_request(request)  # type: ignore[arg-type]
        return request

    def abort(self, request: Request) -> None:
        loading = request.status == "loading"
        self._finish(request, free=not loading)

    def preempt(self, request: Request) -> None:
        """Frees the blocks at once; the request starts again from what the prefix cache still has."""
        assert request.status == "running"
        self._release(request)
        request.num_computed_tokens = 0
        request.status = "waiting"
        self._preempted.add(request.request_id)

    def forget_prefixes(self) -> None:
        self._cached.clear()

    def blocks_of(self, request_id: str) -> set[int]:
        return set(self.requests[request_id].block_ids)

    def named(self, request_id: str) -> int:
        return self._named.get(request_id, 0)

    def forget(self, block_ids: Iterable[int] | None) -> None:
        gone = set(range(len(self._users)) if block_ids is None else block_ids)
        self._cached = {block_hash: block for block_hash, block in self._cached.items() if block not in gone}

    @property
    def unfinished(self) -> bool:
        return any(request.status != "finished" for request in self.requests.values())

    def step(self) -> None:
        scheduled = self._schedule()
        step = self.scheduler.step(scheduled) if self.scheduler else None  # type: ignore[arg-type]
        for worker in self.workers:
            assert step is not None
            worker.begin(step)
        logits = self._forward(scheduled.num_scheduled_tokens) if scheduled.num_scheduled_tokens else {}
        reports = []
        for rank, worker in enumerate(self.workers):
            if rank not in self.stalled:
                worker.load()
            worker.end()
            reports.append(worker.take_ended())
            self._invalid |= worker.take_invalid()
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self.requests[request_id]
            request.num_computed_tokens += count
            self._cache_blocks(request)
            if request.num_computed_tokens == len(request.tokens):
                request.append(int(logits[request_id].argmax()))
                request.scores.append(float(logits[request_id].max()))
                if len(request.output) == request.max_tokens:
                    self._finish(request)
        self._hear([report for report in reports if report is not None])

    def _hear(self, reports: list[Report]) -> None:
        """As vLLM's aggregator: one report a step, and a load has ended when every rank has said so, each once."""
        if not reports:
            return
        assert self.scheduler is not None
        self.scheduler.reported(functools.reduce(Report.joined, reports))
        for request_id in [request_id for report in reports for request_id in report.loads]:
            self._reported[request_id] += 1
            if self._reported[request_id] == self.ranks:
                del self._reported[request_id]
                self._loaded(self.requests[request_id])

    # --- scheduling -------------------------------------------------------------------------------------------

    def _schedule(self) -> Scheduled:
        budget, counts = self.tokens_a_step, {}
        for request in self.requests.values():
            if request.status == "waiting" and not self._preempted:  # vLLM admits nobody beside a preemption
                self._admit(request)
            if request.status == "running" and budget:
                counts[request.request_id] = min(budget, len(request.tokens) - request.num_computed_tokens)
                budget -= counts[request.request_id]
                self._grow(request, request.num_computed_tokens + counts[request.request_id])
                self._cache_blocks(request, ahead=counts[request.request_id])
        preempted, self._preempted = self._preempted, set()
        return Scheduled(counts, self.requests, preempted)

    def _admit(self, request: Request) -> None:
        if request.block_ids:  # after a load
            request.status = "running"
            return
        hits = self._local_hits(request)
        local, external, loading = len(hits) * BLOCK_TOKENS, 0, False
        if self.scheduler:
            matched, loading = self.scheduler.matched_tokens(request.request_id, local)
            if matched is None:
                return
            external = matched
        for block in hits:
            if self._users[block] == 0:
                self._free.remove(block)
            self._users[block] += 1
        request.block_ids = hits
        self._named[request.request_id] = len(hits)
        request.num_computed_tokens = min(local + external, len(request.tokens) if loading else len(request.tokens) - 1)
        self._grow(request, local + external)
        if self.scheduler:
            self.scheduler.allocated(request.request_id, (list(request.block_ids),), external)
        request.status = "loading" if loading else "running"

    def _local_hits(self, request: Request) -> list[int]:
        hits = []
        for block_hash in request.block_hashes[: (len(request.tokens) - 1) // BLOCK_TOKENS]:
            if block_hash not in self._cached:
                break
            hits.append(self._cached[block_hash])
        return hits

    def _grow(self, request: Request, tokens: int) -> None:
        while len(request.block_ids) < blocks_for(tokens, BLOCK_TOKENS):
            block = self._free.pop()
            self._cached = {h: b for h, b in self._cached.items() if b != block}
            self._users[block] = 1
            request.block_ids.append(block)

    def _cache_blocks(self, request: Request, *, ahead: int = 0) -> None:
        """Like vLLM, blocks are cached when *scheduled*: a neighbour may hit them in the step that computes them. And
        each of a request once."""
        if self._prefix_caching:
            whole = (request.num_computed_tokens + ahead) // BLOCK_TOKENS
            named = self.named(request.request_id)
            for block_hash, block in list(zip(request.block_hashes[:whole], request.block_ids, strict=False))[named:]:
                self._cached.setdefault(block_hash, block)
            self._named[request.request_id] = max(whole, named)

    def _loaded(self, request: Request) -> None:
        blocks = request.block_ids
        good = next((n for n, block in enumerate(blocks) if block in self._invalid), len(blocks))
        self._invalid.difference_update(blocks)
        if request.status == "finished":
            self._release(request)
            return
        request.num_computed_tokens = min(good * BLOCK_TOKENS, request.num_computed_tokens, len(request.tokens) - 1)
        self._cache_blocks(request)
        request.status = "waiting"

    def _finish(self, request: Request, *, free: bool = True) -> None:
        request.status = "finished"
        request.result = self.scheduler.finished(request.request_id) if self.scheduler else None
        if free:
            self._release(request)

    def _release(self, request: Request) -> None:
        for block in request.block_ids:
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.insert(0, block)
        request.block_ids = []
        self._named.pop(request.request_id, None)

    # --- the forward pass -------------------------------------------------------------------------------------

    def _forward(self, counts: dict[str, int]) -> dict[str, torch.Tensor]:
        """Layer by layer: every request's K and V are written before any request attends, as in vLLM."""
        spans = {
            n: (self.requests[n].num_computed_tokens, self.requests[n].num_computed_tokens + c)
            for n, c in counts.items()
        }
        hidden = {n: self.model.embedding[self.requests[n].tokens[a:b]] for n, (a, b) in spans.items()}
        self.forward_tokens += sum(counts.values())
        for layer in range(LAYERS):
            queries = {n: self._write(layer, n, spans[n], hidden[n]) for n in counts}
            for n in counts:
                hidden[n] = hidden[n] + self._attend(layer, n, spans[n], queries[n]) @ self.model.out[layer]
            for worker in self.workers:
                worker.save_layer(f"layer.{layer}")
        return {n: states[-1] @ self.model.embedding.T for n, states in hidden.items()}

    def _write(self, layer: int, name: str, span: tuple[int, int], hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (torch.tanh(hidden) @ self.model.mix[layer]).chunk(3, dim=-1)
        blocks = self.requests[name].block_ids
        for n, position in enumerate(range(*span)):
            rows = self.caches[:, layer, blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS]
            rows[:] = torch.stack((key[n], value[n])).unflatten(-1, (self.shards, -1)).movedim(1, 0)
        return query

    def _attend(self, layer: int, name: str, span: tuple[int, int], query: torch.Tensor) -> torch.Tensor:
        start, end = span
        table = self.requests[name].block_ids[: blocks_for(end, BLOCK_TOKENS)]
        context = torch.cat([self._own(rank, layer, table)[:end] for rank in range(self.ranks)], dim=-1)
        key, value = (context[:, kind].unflatten(-1, (HEADS, HEAD_SIZE)) for kind in (0, 1))
        scores = torch.einsum("qhd,khd->hqk", query.unflatten(-1, (HEADS, HEAD_SIZE)), key) / HEAD_SIZE**0.5
        future = torch.ones(end - start, end, dtype=torch.bool, device=query.device).triu(1 + start)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)

    def _own(self, rank: int, layer: int, table: list[int]) -> torch.Tensor:
        """K and V of the rank's own heads, as it keeps them itself."""
        context, own = self.caches[rank, layer, table].flatten(0, 1), WIDTH // self.ranks
        return context[..., rank * own : (rank + 1) * own] if self.shards < self.ranks else context

    def prompt_bytes(self, request: Request, block_ids: list[int]) -> np.ndarray:
        """The written K and V of a request's prompt, for comparison between engines."""
        tokens = len(request.prompt_token_ids)
        return self.caches[:, :, block_ids].flatten(2, 3)[:, :, :tokens].contiguous().cpu().numpy().view(np.uint8)
