"""The files of a medium that failed before it was opened: none, and none can be made. A tier over them is off."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pdx.layout import ALIGN_BYTES
from pdx.tiers.folder import Found


class BrokenFiles:
    """See Files."""

    unaligned = 0
    unit_bytes = ALIGN_BYTES
    stranded_bytes = 0
    unseen = "its disk could not be opened"

    def __init__(self, error_number: int) -> None:
        self._error_number = error_number

    def scan(self) -> list[Found]:
        return []

    def write(self, name: str, buffers: Sequence[memoryview]) -> int:
        raise self._error()

    def read(self, name: str, *, head: memoryview, rest: Sequence[memoryview]) -> int:
        raise self._error()

    def remove(self, name: str) -> None:
        raise self._error()

    def leave(self, names: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass

    def __repr__(self) -> str:
        return "<BrokenFiles>"

    def _error(self) -> OSError:
        return OSError(self._error_number, os.strerror(self._error_number))
