"""Which engines have room for a request, and which begin with it soon enough. Pure functions on a snapshot."""

from __future__ import annotations

import math

from pdx.router.choice.policy import Candidate, Side, Snapshot, serving
from pdx.router.line.admission import RETRY_AFTER_MAX_S
from pdx.router.request.settings import Settings


def roomy(snapshot: Snapshot, settings: Settings) -> Snapshot:
    """Those at which this router has fewer calls under way than it may have. (How long lines are is for policies.)"""

    def has_room(engine: Candidate) -> bool:
        limit = settings.max_in_flight_prefill if engine.info.role == "prefill" else settings.max_in_flight_decode
        return not limit or engine.in_flight < limit

    return tuple(filter(has_room, snapshot))


def soon(snapshot: Snapshot, settings: Settings) -> Snapshot:
    """Those that are predicted to begin within `max_wait_s`."""
    limit_s = settings.max_wait_s
    return tuple(engine for engine in snapshot if engine.wait_s <= limit_s) if limit_s else snapshot


def soon_in_s(snapshot: Snapshot, model: str, settings: Settings, *, alone: bool) -> int:
    """When a pair of this model, or an engine alone, is one of them again. Whole seconds, from 1 to a minute."""
    sides: tuple[Side, ...] = ("decode",) if alone else ("prefill", "decode")
    first_s = (min((c.wait_s for c in serving(snapshot, model, side)), default=0.0) for side in sides)
    return min(RETRY_AFTER_MAX_S, max(1, math.ceil(max(first_s) - settings.max_wait_s)))
