"""Which engines have room for a request, and which begin with it soon enough. Pure functions on a snapshot."""

from __future__ import annotations

import math

from pdx.router.choice.policy import Candidate, Snapshot
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


def soon_in_s(snapshot: Snapshot, settings: Settings) -> int:
    """When the first of those that are not is one of them again. Whole seconds, at least one."""
    over_s = (engine.wait_s - settings.max_wait_s for engine in snapshot if engine.wait_s > settings.max_wait_s)
    return max(1, math.ceil(min(over_s, default=0.0)))
