"""Prompts that this router has sent to engines and that no byte has come of yet: how long each engine's line is.

A prompt is in the line from its dispatch on, before anything else is chosen, so that a burst spreads. The line's head
counts for less the longer it is being computed. From how long answers take, the pace of engines that tell none is
learned, for all of a kind together: an engine that once seemed slow would get nothing by which to seem faster. And what
a request in flight adds to the first step of the next one at a decode engine.

One thread. Time is an argument, in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pdx.rates import Busy, Rate

MEASURED_TOKENS_MIN = 64  # a shorter prompt says more of the way than of computing
NOMINAL_STEP_S = 0.001
KINDS_MAX = 64


@dataclass(eq=False, slots=True)
class Piece:
    """One request's call."""

    engine_id: str
    kind: bytes  # engines of one kind have one pace
    tokens: float  # of its prompt that the engine has to compute
    load: int  # requests in flight there, this one among them; 0: the time it takes says nothing of that
    began_at: float
    computed_by: float  # when its prompt should be, if its first byte comes behind its last token only


@dataclass(eq=False, slots=True)
class _Line:
    pieces: dict[Piece, None] = field(default_factory=dict)  # in order of dispatch
    head_since: float = 0.0
    busy: Busy = field(default_factory=Busy)
    steps: Rate = field(default_factory=Rate)  # seconds for each request in flight


class Work:
    """Owned by the event loop's thread. Engines that have left are forgotten by `keep`."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._paces: dict[bytes, Rate] = {}

    def sent(
        self, engine_id: str, tokens: float, now: float, *, load: int, kind: bytes = b"", computed_by: float = math.inf
    ) -> Piece:
        """`tokens` 0: what it is to compute is unknown, or nothing."""
        line = self._lines.setdefault(engine_id, _Line())
        if not line.pieces:
            line.head_since = now
        piece = Piece(engine_id, kind, tokens, load, now, computed_by)
        line.pieces[piece] = None
        return piece

    def over(self, piece: Piece, now: float, *, answered: bool) -> None:
        """Its first bytes have come, or it was dropped."""
        line = self._lines.get(piece.engine_id)
        if line is None or piece not in line.pieces:
            return
        del line.pieces[piece]
        line.head_since = now
        if not piece.tokens:
            if answered and piece.load:
                line.steps.measured(now - piece.began_at, seconds=float(piece.load), now=now)
            return
        seconds = line.busy.ended(began_at=piece.began_at, now=now)
        if answered and piece.tokens >= MEASURED_TOKENS_MIN:
            self._paces.setdefault(piece.kind, Rate()).measured(piece.tokens, seconds=seconds, now=now)
            if len(self._paces) > KINDS_MAX:
                del self._paces[next(iter(self._paces))]

    def ahead_s(self, engine_id: str, tokens_per_s: float, now: float) -> float:
        """How long the engine takes for its line, at this pace."""
        line = self._lines.get(engine_id)
        if line is None:
            return 0.0
        ahead = [piece.tokens for piece in line.pieces if now < piece.computed_by]
        if not ahead:
            return 0.0
        done = min(ahead[0], (now - line.head_since) * tokens_per_s)
        return (sum(ahead) - done) / tokens_per_s

    def tokens_per_s(self, kind: bytes) -> float:
        """As learned here; 0: not yet."""
        pace = self._paces.get(kind)
        return (pace.per_s or 0.0) if pace is not None else 0.0

    def step_s(self, engine_id: str) -> float:
        line = self._lines.get(engine_id)
        return (line.steps.per_s or NOMINAL_STEP_S) if line is not None else NOMINAL_STEP_S

    def keep(self, engine_ids: set[str]) -> None:
        """Forgets all others that have nothing under way."""
        self._lines = {name: line for name, line in self._lines.items() if name in engine_ids or line.pieces}

    def __repr__(self) -> str:
        return f"<Work in {sum(bool(line.pieces) for line in self._lines.values())} lines>"
