"""What loading costs here: how fast the disk reads, how fast each engine takes blocks out of the arena.

The disk is one for all. Engines differ in how they copy, and in how fast they compute, which each tells with its
look-ups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pdx.daemon.grips import Grip
from pdx.daemon.ports import namespace_for
from pdx.daemon.sessions import Engine
from pdx.daemon.tiering import PROMISED_MAX, Tiering
from pdx.layout import PageLayout
from pdx.tiers.cost import CostModel
from pdx.wire import LetGo, LookUp


class Costs:
    """Owned by the control thread."""

    def __init__(self, counters: Counter[str], tiering: Tiering | None) -> None:
        self._counters = counters
        self._tiering = tiering
        self._arena: dict[str, CostModel] = {}  # by engine id
        self._tokens_per_s: dict[str, float] = {}  # as the engine told last

    def worthwhile(self, engine: Engine, message: LookUp, *, arena_blocks: int, room: bool) -> Sequence[bytes]:
        """Of the blocks that are looked for, the leading ones that are kept and come sooner than they are computed.

        `arena_blocks`: how many of the first are in the arena. `room`: whether others may come up from below.
        """
        hashes, pages, engine_id = message.block_hashes, engine.pages, engine.info.engine_id
        assert pages is not None
        self._tokens_per_s[engine_id] = message.tokens_per_s
        block_tokens = engine.info.layout.block_tokens
        if arena_blocks and not self._judge(
            "arena",
            self._arena.setdefault(engine_id, CostModel()),
            tokens=arena_blocks * block_tokens,
            tokens_per_s=message.tokens_per_s,
            size_bytes=arena_blocks * pages.block_bytes,
        ):
            return []
        if self._tiering is None or not room:
            return hashes[:arena_blocks]
        namespace, below = namespace_for(engine, message.tenant), hashes[arena_blocks : arena_blocks + PROMISED_MAX]
        below = below[: self._tiering.leading(namespace, below)]
        if below and not self._judge(
            "disk",
            self._tiering.reads,
            tokens=len(below) * block_tokens,
            tokens_per_s=message.tokens_per_s,
            size_bytes=self._tiering.to_read(namespace, below) * pages.block_bytes,
            queued_bytes=self._tiering.queued_bytes,
        ):
            return hashes[:arena_blocks]
        return hashes[: arena_blocks + len(below)]

    def ended(self, grip: Grip, message: LetGo, pages: PageLayout, now: float) -> None:
        """A load of what was in the arena. With the ranks' pages of one shard, each has copied all of it."""
        if message.ok and message.pages and message.seconds:
            size_bytes = message.pages * pages.page_bytes * pages.shards // grip.ranks
            model = self._arena.setdefault(grip.engine_id, CostModel())
            model.loaded(size_bytes, seconds=message.seconds, now=now)

    def forget(self, engine_id: str) -> None:
        self._arena.pop(engine_id, None)
        self._tokens_per_s.pop(engine_id, None)

    def stats(self) -> dict[str, Any]:
        """Rates for people, 0 before they are measured; values are plain data."""
        return {
            "disk_bytes_per_s": (self._tiering.reads.bytes_per_s or 0.0) if self._tiering is not None else 0.0,
            "arena_bytes_per_s": {name: model.bytes_per_s or 0.0 for name, model in self._arena.items()},
            "tokens_per_s": dict(self._tokens_per_s),
        }

    def _judge(
        self, tier: str, model: CostModel, *, tokens: int, tokens_per_s: float, size_bytes: int, queued_bytes: int = 0
    ) -> bool:
        verdict = model.judge(
            tokens=tokens, tokens_per_s=tokens_per_s, size_bytes=size_bytes, queued_bytes=queued_bytes
        )
        if verdict.tried:
            self._counters["loads_tried"] += 1
        elif not verdict.load:
            self._counters[f"loads_skipped_{tier}"] += 1
        return verdict.load
