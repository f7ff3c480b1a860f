"""SIGTERM and SIGHUP interrupt a program as ^C does, so that what it has started is ended.

What benchmarks start has sessions of its own, or lives in network namespaces, and would outlive `timeout` or a dropped
connection. Nothing dies with its parent here by the kernel's word: an arm may be stopped (SIGSTOP), and would not hear.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

LEAVING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Enter before the first thing is started, in the main thread; also a decorator. It may be entered within itself.

    The first signal raises KeyboardInterrupt, later ones (a shell and the kernel both tell of a lost terminal) do
    nothing. A signal that somebody else handles, or that is ignored (nohup), stays so.
    """
    ours = [number for number in LEAVING if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: object) -> None:
    for each in LEAVING:
        if signal.getsignal(each) == _leave:
            signal.signal(each, _already)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _already(number: int, frame: object) -> None:
    """It is leaving."""
