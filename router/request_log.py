"""The request log: a line of JSON for each request, in a file or on stdout. None is kept unless --request-log says so.

A thread of its own writes, so that a slow disk, or a pipe that nobody reads, holds up no stream; what it can't take in
time is lost, which the router's log says. Workers append to one file, whole lines at a time. A file that is moved away
is followed by a new one of its name, so logrotate needs no signal. No line has a text of a prompt or a key in it.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import msgspec

from pdx.errors import ConfigError
from pdx.router.live.values import RequestRow
from pdx.router.request.prefill_reply import PrefillReply

STDOUT = "-"
FLUSH_S = 0.25
LINES_MAX = 20_000  # that wait to be written: some 10 MB
CLOSE_S = 2.0  # at the end they get so long
PATH_CHARS_MAX = 200

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class RequestLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request. What was refused before an engine was chosen has neither way nor engines."""

    time: str  # of its arrival
    id: str
    path: str  # without its query
    model: str = ""
    way: str = ""  # as in x-pdx-way
    reason: str = ""  # why it was refused, or why an engine answers alone
    handoff: str = ""  # how it ended, as in pdx_router_handoffs_total
    prefill: str = ""
    decode: str = ""
    code: int  # 499: the client left first
    ttft_s: float | None = None  # None: no byte was sent
    duration_s: float = 0.0
    prompt_tokens: int | None = None  # None: not known, as of whole requests of one engine
    cached_tokens: int | None = None


def line_of(row: RequestRow, reply: PrefillReply | None) -> RequestLine:
    """Of a request that has ended. `reply`: prefill's, if there is one."""
    first_us = next((step.at_us for step in row.steps if step.what == "first_byte"), None)
    return RequestLine(
        time=written(row.began_unix_s),
        id=row.request_id,
        path=row.path,
        model=row.model,
        way=row.way,
        reason=row.reason,
        handoff=row.outcome if row.handoff else "",
        prefill=row.prefill,
        decode=row.decode,
        code=row.code,
        ttft_s=None if first_us is None else first_us / 1e6,
        duration_s=row.steps[-1].at_us / 1e6,
        prompt_tokens=len(reply.prompt_token_ids) or None if reply is not None else None,
        cached_tokens=reply.cached.tokens if reply is not None and reply.cached is not None else None,
    )


def refused_line(*, request_id: str, path: str, code: int, reason: str) -> RequestLine:
    """Of a request that came to no engine. Its path may be anything."""
    known = path[:PATH_CHARS_MAX].encode(errors="replace").decode()
    return RequestLine(time=written(time.time()), id=request_id, path=known, code=code, reason=reason)


def written(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")


class RequestLog:
    """Add lines from one thread; close it."""

    def __init__(self, file: str) -> None:
        """`file`: its name, or "-" for stdout. Raises ConfigError if it can't be written."""
        self._file = file
        try:
            self._descriptor = _opened(file)
        except OSError as error:
            raise ConfigError(f"can't write --request-log {file}: {error.strerror}") from error
        self._waiting: deque[RequestLine] = deque()
        self._complained = False  # until it goes on
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def add(self, line: RequestLine) -> None:
        """Never blocks, never fails."""
        if len(self._waiting) < LINES_MAX:
            self._waiting.append(line)
        else:
            self._complain("it is written too slowly")

    def close(self) -> None:
        """Writes what waits, for at most CLOSE_S."""
        self._ended.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._ended.wait(FLUSH_S):
            self._write()
        self._write()
        if self._file != STDOUT:
            os.close(self._descriptor)

    def _write(self) -> None:
        lines = [_encode(self._waiting.popleft()) + b"\n" for _ in range(len(self._waiting))]
        if not lines:
            return
        try:
            self._follow()
            for lot in _lots(lines):
                left = memoryview(lot)
                while left:
                    left = left[os.write(self._descriptor, left) :]
            self._complained = False
        except OSError as error:
            self._complain(error.strerror)

    def _follow(self) -> None:
        """To the file that has the name now."""
        if self._file == STDOUT:
            return
        try:
            there = os.path.samestat(os.stat(self._file), os.fstat(self._descriptor))
        except FileNotFoundError:
            there = False
        if not there:
            descriptor = _opened(self._file)
            os.close(self._descriptor)
            self._descriptor = descriptor

    def _complain(self, why: str | None) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("lines of the request log %s are lost: %s", self._file, why)


def _opened(file: str) -> int:
    if file == STDOUT:
        return 1
    return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _lots(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Of whole lines, and no more than goes into a pipe at once: between them may come those of other workers."""
    lot = b""
    for line in lines:
        if lot and len(lot) + len(line) > select.PIPE_BUF:
            yield lot
            lot = b""
        lot += line
    if lot:
        yield lot
