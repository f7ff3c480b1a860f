"""What the system lets a process have."""

from __future__ import annotations

import contextlib
import resource


def raise_descriptor_limit() -> None:
    """To what the machine allows. A process that runs out of descriptors loses connections and takes peers for dead."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def within_descriptors(most: int, *, least: int) -> int:
    """How many connections of one kind may be open: `most`, but no more than a quarter of our descriptors, unless that
    is less than `least`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(most, max(least, soft // 4))
