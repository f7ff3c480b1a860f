"""What the system lets a process have."""

from __future__ import annotations

import contextlib
import resource


def raise_descriptor_limit() -> None:
    """To what the machine allows. A process that runs out of descriptors loses connections and takes peers for dead."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
