"""The last that a daemon does: what only its arena has goes to the disk, as far as a deadline allows."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable

PROGRESS_EVERY_S = 1.0
TURN_S = 0.1  # a disk that says nothing is looked at as often as in the daemon's own loop

log = logging.getLogger("pdxd")


def flush(step: Callable[[], int], descriptor: int, *, deadline_s: float, hurried: Callable[[], bool]) -> int:
    """Calls `step`, which says how many blocks are left, whenever `descriptor` is readable. Returns what is left then.

    Ends early when nothing is, or somebody is in a hurry: a second signal.
    """
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    started_at = now = time.monotonic()
    next_progress = started_at + PROGRESS_EVERY_S
    left = step()
    while left and now - started_at < deadline_s and not hurried():
        poller.poll(1000 * min(TURN_S, deadline_s - (now - started_at)))
        left, now = step(), time.monotonic()
        if left and now >= next_progress:
            next_progress = now + PROGRESS_EVERY_S
            left_s = deadline_s - (now - started_at)
            log.info("writing what only the arena has: %d blocks to go, %.0f s left", left, left_s)
    return left
