"""A lane that lives in a process of its own, as a Lane of this one: so that every check runs in two real processes.

Only what the far side of a Pair needs is there. Memory is shared with the child, hence nothing is copied to compare it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from far_process import decode_event
from lane_pairs import KEY

from pdx.transport.api import CONTRACT, Copy, Event, Lane, Span
from pdx.transport.side import MEMORY_BYTES, WAIT_S
from pdx.transport.spans import check_inside

HERE = Path(__file__).parent
START_S = 60.0  # on a busy machine NIXL's libraries alone take 10 s to load


class ProcessLane:
    """See Lane. `within`: a command line to start the process under, such as one that enters a network namespace."""

    def __init__(
        self,
        url: str,
        *,
        checked_by: Literal["receiver", "sender"],
        within: Sequence[str] = (),
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.contract = CONTRACT
        self.scheme = url.partition("://")[0]
        self.checked_by: Literal["receiver", "sender"] = checked_by
        memory_fd = os.memfd_create("far-memory")
        os.ftruncate(memory_fd, memory_bytes)
        self._map = mmap.mmap(memory_fd, memory_bytes)
        self._calls, theirs = socket.socketpair()
        self._calls.settimeout(START_S)
        self._buffer = b""
        self._events: list[Event] = []
        self._views: list[memoryview] = []
        self._is_over = False
        command = [*within, sys.executable, str(HERE / "far_process.py"), url, KEY.hex()]
        self.process = subprocess.Popen(
            [*command, str(memory_fd), str(theirs.fileno())],
            pass_fds=(memory_fd, theirs.fileno()),
            env={**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}"},
        )
        os.close(memory_fd)
        theirs.close()
        try:
            self.endpoint: str = self._answer()
            self._calls.settimeout(WAIT_S)
        except BaseException:
            self.abort()
            raise

    def make_memory(self, length: int) -> mmap.mmap:
        assert length == len(self._map)
        return self._map

    def fileno(self) -> int:
        return self._calls.fileno()

    def register(self, memory: memoryview) -> ProcessRegion:
        self._views.append(memory)
        return ProcessRegion(self, memory.nbytes)

    def connect(self, endpoint: str) -> int:
        return int(self.call("connect", endpoint=endpoint))

    def put(self, channel: int, *, region: object, window: int, copies: Sequence[Copy], notice: bytes, queue: bytes,
            urgency: float) -> int:  # fmt: skip
        rows = [[copy.source_offset, copy.target_offset, copy.length] for copy in copies]
        return int(self.call("put", channel=channel, window=window, copies=rows, notice=notice.hex(),
                             queue=queue.hex(), urgency=urgency))  # fmt: skip

    def cancel(self, queue: bytes) -> None:
        self.call("cancel", queue=queue.hex())

    def take_events(self) -> list[Event]:
        while not self._is_over and select.select([self._calls], [], [], 0)[0]:
            self._read()
        events, self._events = self._events, []
        return events

    def close(self, *, drain_s: float) -> None:
        if not self._is_over:
            self.call("close", drain_s=drain_s)
        self.abort()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        # The signal is only on its way: until one of its threads has taken it, the others go on.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def abort(self) -> None:
        """kill -9. The memory goes too, lest a failed check, whose frames pytest keeps, keep it."""
        self.process.kill()
        self.process.wait(10)
        self._calls.close()
        self._is_over = True
        for view in self._views:
            view.release()
        with contextlib.suppress(BufferError):  # a check still looks at a part of it
            self._map.close()

    def call(self, name: str, **arguments: object) -> Any:
        self._calls.sendall(json.dumps({"name": name, **arguments}).encode() + b"\n")
        return self._answer()

    def _answer(self) -> Any:
        while True:
            for line in self._read():
                return line
            if self._is_over:
                raise AssertionError("the far process has ended")

    def _read(self) -> list[Any]:
        data = self._calls.recv(1 << 20)
        if not data:
            self._is_over = True
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        answers = []
        for line in lines:
            said = json.loads(line)
            if "events" in said:
                self._events += [decode_event(raw) for raw in said["events"]]
            else:
                answers.append(said["answer"])
        return answers


class ProcessRegion:
    def __init__(self, lane: ProcessLane, length: int) -> None:
        self._lane = lane
        self._length = length

    def open_window(self, spans: Sequence[Span]) -> int:
        check_inside(spans, self._length)
        return int(self._lane.call("open_window", spans=[[span.offset, span.length] for span in spans]))

    def close_window(self, window: int) -> None:
        self._lane.call("close_window", window=window)


class ProcessPair:
    """A Pair whose far lane is another process: killing it is a kill."""

    def __init__(self, near: Lane, *, within: Sequence[str] = (), far_host: str = "127.0.0.1") -> None:
        self.near = near
        self._within = within
        self._opened: list[ProcessLane] = []
        self.far = self._open(f"{near.scheme}://{far_host}:0")

    def kill_far(self) -> None:
        self.far.abort()

    def stop_far(self) -> None:
        self.far.stop()

    def continue_far(self) -> None:
        self.far.go_on()

    def revive_far(self) -> Lane:
        self.far = self._open(self.far.endpoint)
        return self.far

    def abort(self) -> None:
        self.near.abort()
        for lane in self._opened:
            lane.abort()

    def _open(self, url: str) -> ProcessLane:
        lane = ProcessLane(url, checked_by=self.near.checked_by, within=self._within)
        self._opened.append(lane)
        return lane
