"""Questions to file systems, answered in a thread of its own where one may hang: that holds up nobody else."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

# They hang only with the machine. Asked directly they answer in a microsecond; a thread's turn takes 40.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "f2fs", "zfs", "tmpfs", "ramfs"}
WAIT_S = 0.02  # a local one answers within microseconds, one behind a network within milliseconds


class Asking(Generic[T]):
    """One question at a time. Owned by the thread that asks; questions must raise nothing."""

    def __init__(self, *, direct: bool = False, wait_s: float = WAIT_S) -> None:
        self.direct = direct  # without a thread
        self._wait_s = wait_s
        self._questions: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unanswered = False  # the last question has had no answer in time

    def ask(self, question: Callable[[], T]) -> T | None:
        """None: there is no answer in time. While it is awaited, others have none at once."""
        if self.direct:
            return question()
        if self._thread is None:
            self._thread = threading.Thread(target=_answer, args=(self._questions, self._answers), name="pdx-asking")
            self._thread.daemon = True  # it may hang for good
            self._thread.start()
            weakref.finalize(self, self._questions.put, None)
        if self._unanswered:
            if self._answers.empty():
                return None
            self._answers.get()  # too late
        self._questions.put(question)
        try:
            answer = self._answers.get(timeout=self._wait_s)
        except queue.Empty:
            self._unanswered = True
            return None
        self._unanswered = False
        return answer


def all_local(paths: Iterable[str]) -> bool:
    """Whether all of these, and what they link to, lie on file systems that don't hang. Raises OSError."""
    local = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.split(" ")[0] in LOCAL:
            local.add(mount.split(" ")[2])
    devices = {os.stat(path).st_dev for path in paths}
    return all(f"{os.major(device)}:{os.minor(device)}" in local for device in devices)


def _answer(questions: queue.SimpleQueue[Callable[[], T] | None], answers: queue.SimpleQueue[T]) -> None:
    """Ends with who asks, or later if a question hangs."""
    while (question := questions.get()) is not None:
        answers.put(question())
        del question  # it may know who asks
