"""A small engine with real paged attention, for tests of the connector without vLLM.

A random two-matrix transformer in float64 writes K and V of each layer into pages of a paged cache and attends through
block tables. It has what matters to a KV connector: chunked prefill, several requests a step, a prefix cache whose
blocks may be computed by a neighbour in the same step, preemption, a hook after each layer's attention, and loads that
end some steps later. Steps call the connector's two halves in vLLM's order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pdx.engine.vllm.caches import Caches
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.layout import PageLayout, blocks_for

LAYERS, HEADS, HEAD_SIZE, VOCABULARY = 3, 2, 8, 97
WIDTH = HEADS * HEAD_SIZE
BLOCK_TOKENS = 4
LAYOUT = PageLayout(layers=LAYERS, page_bytes=BLOCK_TOKENS * 2 * WIDTH * 8, chunk_blocks=4)


@dataclass(eq=False)
class Request:
    """The attributes of vLLM's Request that a connector reads, and this engine's own."""

    request_id: str
    prompt_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None = None
    max_tokens: int = 1
    mm_features: list[Any] = field(default_factory=list)
    lora_request: Any = None
    skip_reading_prefix_cache: bool = False
    num_computed_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    status: str = "waiting"  # waiting, loading, running, finished
    result: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.block_hashes: list[bytes] = []
        for token in self.prompt_token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if len(self.tokens) % BLOCK_TOKENS == 0:
            parent = self.block_hashes[-1] if self.block_hashes else b""
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

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())

    @property
    def kv_connector_block_state(self) -> Scheduled:
        return self

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return (self.requests[request_id].block_ids,)


class Model:
    """Weights; equal seeds give equal models."""

    def __init__(self, seed: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=generator)
        self.mix = torch.randn(LAYERS, WIDTH, 3 * WIDTH, dtype=torch.float64, generator=generator) / WIDTH**0.5
        self.out = torch.randn(LAYERS, WIDTH, WIDTH, dtype=torch.float64, generator=generator) / WIDTH**0.5


class TorchEngine:
    """One engine. `step` does what one turn of vLLM's loop does."""

    def __init__(
        self, model: Model, *, blocks: int = 128, tokens_a_step: int = 10, prefix_caching: bool = True
    ) -> None:
        self.model = model
        self.tokens_a_step = tokens_a_step
        self.requests: dict[str, Request] = {}
        self.caches = torch.zeros(LAYERS, blocks, BLOCK_TOKENS, 2, WIDTH, dtype=torch.float64)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        self.forward_tokens = 0
        self._prefix_caching = prefix_caching
        self._free = list(range(blocks - 1, 0, -1))  # block 0 is the null block
        self._users = dict.fromkeys(range(blocks), 0)
        self._cached: dict[bytes, int] = {}

    def pages(self) -> Caches:
        """Byte views of the cache, for the worker's half."""
        views = tuple(layer.view(torch.uint8).flatten(1).numpy() for layer in self.caches)
        return Caches(views, {f"layer.{layer}": layer for layer in range(LAYERS)}, (0,) * LAYERS)

    def connect(self, scheduler: SchedulerSide, worker: WorkerSide) -> None:
        self.scheduler, self.worker = scheduler, worker

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

    def forget_prefixes(self) -> None:
        self._cached.clear()

    @property
    def unfinished(self) -> bool:
        return any(request.status != "finished" for request in self.requests.values())

    def step(self) -> None:
        scheduled = self._schedule()
        step = self.scheduler.step(scheduled) if self.scheduler else None  # type: ignore[arg-type]
        if self.worker:
            assert step is not None
            self.worker.begin(step)
        logits = self._forward(scheduled.num_scheduled_tokens) if scheduled.num_scheduled_tokens else {}
        report, invalid = None, set()
        if self.worker:
            self.worker.load()
            self.worker.end()
            report, invalid = self.worker.take_ended(), self.worker.take_invalid()
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self.requests[request_id]
            request.num_computed_tokens += count
            self._cache_blocks(request)
            if request.num_computed_tokens == len(request.tokens):
                request.append(int(logits[request_id].argmax()))
                if len(request.output) == request.max_tokens:
                    self._finish(request)
        if report is not None:
            assert self.scheduler is not None
            self.scheduler.reported(report)
            for request_id in report.loads:
                self._loaded(self.requests[request_id], invalid)

    # --- scheduling -------------------------------------------------------------------------------------------

    def _schedule(self) -> Scheduled:
        budget, counts = self.tokens_a_step, {}
        for request in self.requests.values():
            if request.status == "waiting":
                self._admit(request)
            if request.status == "running" and budget:
                counts[request.request_id] = min(budget, len(request.tokens) - request.num_computed_tokens)
                budget -= counts[request.request_id]
                self._grow(request, request.num_computed_tokens + counts[request.request_id])
                self._cache_blocks(request, ahead=counts[request.request_id])
        return Scheduled(counts, self.requests)

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
        """Like vLLM, blocks are cached when *scheduled*: a neighbour may hit them in the step that computes them."""
        if self._prefix_caching:
            whole = (request.num_computed_tokens + ahead) // BLOCK_TOKENS
            for block_hash, block in zip(request.block_hashes[:whole], request.block_ids, strict=False):
                self._cached.setdefault(block_hash, block)

    def _loaded(self, request: Request, invalid: set[int]) -> None:
        if request.status == "finished":
            self._release(request)
            return
        good = next((n for n, block in enumerate(request.block_ids) if block in invalid), len(request.block_ids))
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
            if self.worker:
                self.worker.save_layer(f"layer.{layer}")
        return {n: states[-1] @ self.model.embedding.T for n, states in hidden.items()}

    def _write(self, layer: int, name: str, span: tuple[int, int], hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (torch.tanh(hidden) @ self.model.mix[layer]).chunk(3, dim=-1)
        blocks = self.requests[name].block_ids
        for n, position in enumerate(range(*span)):
            page = self.caches[layer, blocks[position // BLOCK_TOKENS]]
            page[position % BLOCK_TOKENS, 0], page[position % BLOCK_TOKENS, 1] = key[n], value[n]
        return query

    def _attend(self, layer: int, name: str, span: tuple[int, int], query: torch.Tensor) -> torch.Tensor:
        start, end = span
        table = self.requests[name].block_ids[: blocks_for(end, BLOCK_TOKENS)]
        context = self.caches[layer, table].flatten(0, 1)[:end]
        key, value = (context[:, kind].unflatten(-1, (HEADS, HEAD_SIZE)) for kind in (0, 1))
        scores = torch.einsum("qhd,khd->hqk", query.unflatten(-1, (HEADS, HEAD_SIZE)), key) / HEAD_SIZE**0.5
        future = torch.arange(end)[None, :] > torch.arange(start, end)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)

    def prompt_bytes(self, request: Request, block_ids: list[int]) -> np.ndarray:
        """The written K and V of a request's prompt, for comparison between engines."""
        tokens = len(request.prompt_token_ids)
        return self.caches[:, block_ids].flatten(1, 2)[:, :tokens].contiguous().numpy().view(np.uint8)
