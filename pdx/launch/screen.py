"""Lines for whoever reads our stderr, who may have stopped: a pager, a hung connection. Nobody here waits for them."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TextIO

WAITING_CHARS_MAX = 4 << 20  # what comes beyond is left out and counted; a burst of an engine's start is a few 100 KiB
LEAVE_S = 2.0  # at the end the last lines may take so long


class Screen:
    """From start() to stop() a thread of its own writes, which may wait for the reader; else whoever says something."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._changed = threading.Condition()  # guards the next five
        self._waiting: list[str] = []
        self._chars = 0
        self._left_out = 0
        self._ended = False
        self._takes = False  # the thread will still write what waits
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._takes = True
        self._thread = threading.Thread(target=self._write_what_comes, name="pdx-screen", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Once started. A thread that still waits for the reader then is left behind."""
        assert self._thread is not None
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(LEAVE_S)

    @property
    def is_terminal(self) -> bool:
        return self._out.isatty()

    def say(self, line: str) -> None:
        with self._changed:
            if self._takes:
                self._leave(line)
                return
        self._write(f"{line}\n")

    def _leave(self, line: str) -> None:
        """For the thread."""
        if self._chars + len(line) > WAITING_CHARS_MAX:
            self._left_out += 1
            return
        self._waiting.append(f"{line}\n")
        self._chars += len(line)
        self._changed.notify()

    def _write_what_comes(self) -> None:
        while text := self._next():
            self._write(text)

    def _next(self) -> str:
        """All that waits; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            text = "".join(self._waiting)
            if self._left_out:
                text += f"pdx: {self._left_out} lines are left out here: they came faster than they were read\n"
            self._waiting, self._chars, self._left_out = [], 0, 0
            self._takes = bool(text)
            return text

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more; or `out` is closed
            try:
                # Not by `out`: its buffer has a lock, for which Python's own end would wait.
                descriptor = self._out.fileno()
            except OSError:  # it has none: it is in memory
                self._out.write(text)
                return
            rest = memoryview(text.encode(errors="backslashreplace"))
            while rest:
                rest = rest[os.write(descriptor, rest) :]
