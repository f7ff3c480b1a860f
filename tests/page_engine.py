"""The torch engine without a model: rows of KV name the text they belong to, and every row that is read is checked.

Costs microseconds a token, so thousands of handoffs can be checked byte by byte under faults (benchmarks.soak).
"""

from __future__ import annotations

import numpy as np
from torch_engine import BLOCK_TOKENS, LAYERS, VOCABULARY, Model, Request, TorchEngine

from pdx.layout import blocks_for

_PRIME = (1 << 31) - 1


def row_names(tokens: list[int]) -> list[int]:
    """One number for each position, made of the text up to and with it."""
    names, name = [], 1
    for token in tokens:
        name = (name * 1_103_515_245 + token + 12_345) % _PRIME
        names.append(name)
    return names


def answer_to(tokens: list[int], max_tokens: int) -> list[int]:
    """What a PageEngine answers."""
    text = list(tokens)
    for _ in range(max_tokens):
        text.append(row_names(text)[-1] % VOCABULARY)
    return text[len(tokens) :]


class PageEngine(TorchEngine):
    """`wrong` collects a line for each request and layer that read a row of another text, or none."""

    def __init__(self, *, blocks: int = 1024, tokens_a_step: int = 24) -> None:
        super().__init__(Model(), blocks=blocks, tokens_a_step=tokens_a_step)
        self.wrong: list[str] = []
        self._rows = self.caches[0].numpy()

    def prune(self) -> list[Request]:
        """Takes out the requests that need nothing more."""
        over = [request for request in self.requests.values() if request.status == "finished" and not request.block_ids]
        for request in over:
            del self.requests[request.request_id]
        return over

    def _forward(self, counts: dict[str, int]) -> dict[str, np.ndarray]:  # type: ignore[override]
        self.forward_tokens += sum(counts.values())
        names = {name: np.array(row_names(self.requests[name].tokens), dtype=np.float64) for name in counts}
        for layer in range(LAYERS):
            for name, count in counts.items():
                self._write_rows(layer, self.requests[name], count, names[name])
            for name, count in counts.items():
                self._check_rows(layer, self.requests[name], count, names[name])
            for worker in self.workers:
                worker.save_layer(f"layer.{layer}")
        return {name: np.arange(VOCABULARY) == names[name][-1] % VOCABULARY for name in counts}

    def _write_rows(self, layer: int, request: Request, count: int, names: np.ndarray) -> None:
        for position in range(request.num_computed_tokens, request.num_computed_tokens + count):
            block, row = divmod(position, BLOCK_TOKENS)
            self._rows[layer, request.block_ids[block], row] = names[position] + layer / 8

    def _check_rows(self, layer: int, request: Request, count: int, names: np.ndarray) -> None:
        end = request.num_computed_tokens + count
        table = request.block_ids[: blocks_for(end, BLOCK_TOKENS)]
        context = self._rows[layer, table].reshape(-1, *self._rows.shape[3:])[:end]
        bad = np.flatnonzero((context != names[:end, None, None] + layer / 8).any(axis=(1, 2)))
        if len(bad):
            self.wrong.append(f"{request.request_id}: layer {layer}, {len(bad)} of {end} rows, first {bad[0]}")
