"""A file layer with faults in it: errors and delays that a test asks for, everything else passed on."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Literal

from pdx.tiers.folder import Files, Found

Call = Literal["write", "read", "remove"]

# A gate that nobody opens again must not hold a thread for ever.
GATE_WAIT_S = 60.0


class FaultyFiles:
    """See Files. While `gate` is closed every call waits; while a call has an entry in `errors`, it fails with that."""

    def __init__(self, files: Files) -> None:
        self.errors: dict[Call, int] = {}
        self.calls: dict[Call, int] = {"write": 0, "read": 0, "remove": 0}
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)  # released by each call that comes to a closed gate
        self._files = files

    @property
    def unaligned(self) -> int:
        return self._files.unaligned

    @property
    def unit_bytes(self) -> int:
        return self._files.unit_bytes

    @property
    def stranded_bytes(self) -> int:
        return self._files.stranded_bytes

    @property
    def unseen(self) -> str:
        return self._files.unseen

    def scan(self) -> list[Found]:
        return self._files.scan()

    def write(self, name: str, buffers: Sequence[memoryview]) -> int:
        self._pass("write")
        return self._files.write(name, buffers)

    def read(self, name: str, *, head: memoryview, rest: Sequence[memoryview]) -> int:
        self._pass("read")
        return self._files.read(name, head=head, rest=rest)

    def remove(self, name: str) -> None:
        self._pass("remove")
        self._files.remove(name)

    def leave(self, names: Sequence[str]) -> None:
        self._files.leave(names)

    def close(self) -> None:
        self._files.close()

    def _pass(self, call: Call) -> None:
        self.calls[call] += 1
        if not self.gate.is_set():
            self.waiting.release()
            self.gate.wait(GATE_WAIT_S)
        number = self.errors.get(call)
        if number is not None:
            raise OSError(number, os.strerror(number))
