"""How much work a call is, as a number that is the same on every machine: for what must not cost a square."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def lines_run(work: Callable[[], object]) -> int:
    """Lines of Python in all that `work` calls, as often as each runs."""
    lines = 0

    def hear(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return hear

    before = sys.gettrace()
    sys.settrace(hear)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def growth(work_of: Callable[[int], Callable[[], object]], *, size: int = 50) -> float:
    """How many times the work of `size` four times as much is: 4 if each costs the same, 16 if it is a square."""
    return lines_run(work_of(4 * size)) / lines_run(work_of(size))
