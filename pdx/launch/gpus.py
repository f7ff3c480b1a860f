"""The NVIDIA GPUs of this machine that a program started here may use."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

_NAME = re.compile(r"\d+|(GPU|MIG)-\S+")


def visible_gpus() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them, or their numbers. As CUDA reads it, what follows a wrong name does not count:
    -1, which is none, hides all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(takewhile(_NAME.fullmatch, map(str.strip, visible.split(","))))
    # CUDA counts those that a container was given from 0, whatever their devices are called.
    found = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))
    return tuple(map(str, range(found)))
