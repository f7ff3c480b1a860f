"""The NVIDIA GPUs of this machine that a program started here may use."""

from __future__ import annotations

import os
import re
from pathlib import Path


def visible_gpus() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them, or their numbers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(filter(None, visible.split(",")))
    numbers = [match[1] for path in Path("/dev").glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", path.name))]
    return tuple(sorted(numbers, key=int))
