"""A relay in front of an engine that passes all bytes on and notes when answers ended. The client's clock, one thread.

It is how a benchmark learns when prefill's answer was there, whoever asked for it: pdx's router, the usual proxy or
vllm-router. All of them have the same relay before their prefill engine, so that its own delay is in every arm.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from pdx.errors import PdxError

READ_BYTES = 256 << 10
BACKLOG = 64
TICK_S = 0.5  # how long closing takes at most
WRITE_S = 30.0  # an end that takes nothing for so long is dropped
ANSWERS_MAX = 10_000  # kept; a benchmark asks for the newest


@dataclass(eq=False)
class Answer:
    """What went back for one POST."""

    asked_ns: int
    last_byte_ns: int = 0


@dataclass(eq=False)
class _End:
    """One socket of a pair; `upstream` is the engine's."""

    socket: socket.socket
    upstream: bool
    other: _End | None = None
    answer: Answer | None = None  # upstream only: the answer under way


class Relay:
    """Listens when made; `target` is set when the engine's address is known. Stopped by leaving the context."""

    def __init__(self) -> None:
        self.target = ""
        self.answers: list[Answer] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join(TICK_S + WRITE_S)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _End):
                key.data.socket.close()
        self._selector.close()
        self._listener.close()

    def answered(self, since_ns: int) -> Answer:
        """The last answer to a POST since then. Raises PdxError if there was none."""
        for answer in reversed(self.answers):
            if answer.asked_ns >= since_ns and answer.last_byte_ns:
                return answer
        raise PdxError("nothing was asked of the engine behind the relay")

    # --- in the thread ---

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(TICK_S):
                if key.data is None:
                    self._accept()
                elif key.data.socket.fileno() >= 0:
                    self._pass_on(key.data)

    def _accept(self) -> None:
        accepted, _ = self._listener.accept()
        where = urlsplit(self.target)
        try:
            upstream = socket.create_connection((where.hostname or "", where.port or 0), timeout=WRITE_S)
        except OSError:  # the engine is not up yet: whoever asks sees a closed connection
            accepted.close()
            return
        near, far = _End(accepted, upstream=False), _End(upstream, upstream=True)
        near.other, far.other = far, near
        for end in (near, far):
            end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.socket.settimeout(WRITE_S)
            self._selector.register(end.socket, selectors.EVENT_READ, end)

    def _pass_on(self, end: _End) -> None:
        assert end.other is not None
        try:
            data = end.socket.recv(READ_BYTES)
            self._note(end, data)
            if data:
                end.other.socket.sendall(data)
        except OSError:
            data = b""
        if not data:
            for each in (end, end.other):
                self._selector.unregister(each.socket)
                each.socket.close()

    def _note(self, end: _End, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        if end.upstream:
            if end.answer is not None and data:
                end.answer.last_byte_ns = now_ns
            return
        assert end.other is not None
        if data.startswith(b"POST "):
            end.other.answer = Answer(now_ns)
            self.answers = [*self.answers[-ANSWERS_MAX:], end.other.answer]
        elif data.startswith(b"GET "):
            end.other.answer = None  # a health check
