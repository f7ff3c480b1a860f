"""What the router knows of one request's prompt when it chooses engines. Made for one snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from pdx.keys import ContentFingerprint
from pdx.router.choice.blocks import Blocks
from pdx.router.choice.knowledge import Found

if TYPE_CHECKING:
    from pdx.router.choice.policy import Candidate

# pdxd itself judges whether reading beats computing, which the router does not know: such blocks count by half.
DISK_SHARE = 0.5
NOTHING = Found()


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    tokens: int  # how many; a guess if there are no ids
    token_ids: list[int] | None = None
    tokenizer: ContentFingerprint | None = None  # of the engine that made these of a text; None: the client did
    blocks: Blocks | None = None  # None: they can't be named
    found: Mapping[bytes, Mapping[str, Found]] = {}  # space of engines -> daemon id -> what it has of them
    generation: int = -1  # of the knowledge that says so

    def ids_at(self, engine: Candidate) -> list[int] | None:
        """What its text is to this engine: one of another content may have another tokenizer under the same name."""
        return self.token_ids if self.tokenizer in (None, engine.info.content) else None

    def names_at(self, engine: Candidate) -> tuple[int, ...]:
        return self.blocks.names(engine.space) if self.blocks is not None else ()

    def cached_tokens(self, engine: Candidate) -> int:
        """Of leading blocks that its daemon has. An engine computes at least the last token."""
        blocks = self.found_at(engine).blocks
        return min(blocks * engine.info.content.block_tokens, max(0, self.tokens - 1))

    def found_at(self, engine: Candidate) -> Found:
        """What its daemon has."""
        return self.found.get(engine.space, {}).get(engine.daemon.daemon_id, NOTHING)

    def work_tokens(self, engine: Candidate) -> float:
        """What it would have to compute, what comes from a disk in part."""
        tokens = min(self.tokens, engine.info.context_tokens or self.tokens)  # of more it refuses all
        found = self.found_at(engine)
        from_disk = (found.blocks - found.arena_blocks) * engine.info.content.block_tokens
        return max(0, tokens - self.cached_tokens(engine)) + DISK_SHARE * min(from_disk, self.cached_tokens(engine))
