"""One HTTP/1.1 connection to an engine: a request at a time, its answer as it comes. Parsed by httptools.

A general client spends more on a call than a router has for all of a request: this one knows only what engines are sent
(a POST or GET with a known length) and what they answer. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

import httptools

from pdx.errors import PdxError

# What an engine sends faster than its client reads is held back in the kernel beyond this.
READ_AHEAD_BYTES = 256 << 10
# Longer bodies are written in pieces: in one write they would hold up the loop, hence every other stream.
PIECE_BYTES = 256 << 10
HEAD_BYTES_MAX = 64 << 10
SEGMENT_BYTES = 256 << 10  # what event loops hand over at once


class UpstreamError(PdxError):
    """An engine could not be reached or broke off. `unreachable`: nobody listens there, try another at once. `blames`:
    whether it says that something is wrong with the engine."""

    def __init__(self, reason: str, *, unreachable: bool = False, blames: bool = True) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        self.blames = blames


class EngineConnection(asyncio.Protocol):
    """Give it a request with `send` or `post`, wait for `head`, then take chunks until one is empty."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._error = ""
        self._paused = False
        self._reset()

    def __repr__(self) -> str:
        state = self._error or ("idle" if self._complete else "answering" if self._has_head else "waiting")
        return f"<EngineConnection {state}>"

    # --- the caller's side ------------------------------------------------------------------------------------

    @property
    def reusable(self) -> bool:
        """Whether its last request and answer are over, and the engine keeps the connection open.

        One that answers before it has read the whole request takes the next one for the rest of it.
        """
        over = self._sent and self._complete and not self._paused
        return over and self._keeps_open and not self._error

    def post(self, head: bytes, body: bytes) -> None:
        """Sends a short request, of PIECE_BYTES at most, without waiting. Raises UpstreamError."""
        self._reset()
        self._usable().write(head + body)
        self._sent = True

    async def send(self, head: bytes, body: bytes) -> None:
        """Raises UpstreamError."""
        if len(body) <= PIECE_BYTES:
            self.post(head, body)
            return
        self._reset()
        transport = self._usable()
        transport.write(head)
        pieces = memoryview(body)
        for start in range(0, len(body), PIECE_BYTES):
            if self._error or self._has_head:  # it has answered before it has read all of it
                return
            transport.write(pieces[start : start + PIECE_BYTES])
            if self._writable is not None:
                await self._writable
        self._sent = True

    async def head(self) -> None:
        """Until status and headers are here. Raises UpstreamError."""
        while not self._has_head:
            await self._more()

    async def chunk(self) -> bytes:
        """What has come of the body since the last call; empty at its end. Raises UpstreamError."""
        while not self._chunks:
            if self._complete:
                return b""
            await self._more()
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._held_bytes = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def close(self) -> None:
        """At once, whatever is under way. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def _usable(self) -> asyncio.Transport:
        if self._transport is None or self._error:
            raise UpstreamError("broken")
        return self._transport

    async def _more(self) -> None:
        if self._error:
            raise UpstreamError(self._error)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _reset(self) -> None:
        self.status = 0
        self.content_type = "application/json"
        self.retry_after_s = 0
        self._parser = httptools.HttpResponseParser(self)
        self._has_head, self._complete, self._keeps_open, self._until_closed = False, False, False, True
        self._sent = self._paused = False
        self._chunks: deque[bytes] = deque()
        self._held_bytes = self._head_bytes = self._framing_bytes = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- the transport's side ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._complete:  # nobody has asked for more
            self._fail("broken")
            return
        # Since the last head or piece of body: the parser keeps a header until it is whole, however long it is. (What
        # comes at once may be its end, and some body.)
        self._framing_bytes += len(data)
        if self._framing_bytes > HEAD_BYTES_MAX + SEGMENT_BYTES:
            self._fail("broken")
            self._wake()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("broken")
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if error is None and not self._error and self._has_head and self._until_closed:
            self._complete = True
        self._error = self._error or ("closed" if self._complete else "broken")
        self.resume_writing()
        self._wake()

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def _fail(self, reason: str) -> None:
        self._error = reason
        self.close()

    # --- the parser's side ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:  # nobody has asked for a second one
            raise ValueError("two answers to one request")  # as in `on_header`

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES_MAX:
            raise ValueError("a longer head than engines have")  # ends the parser, hence the connection
        match name.lower():
            case b"content-type":
                self.content_type = value.decode("latin-1")
            case b"content-length" | b"transfer-encoding":
                self._until_closed = False
            case b"retry-after" if value.isdigit() and len(value) < 10:  # in seconds; dates are not passed on
                self.retry_after_s = int(value)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._has_head = self.status >= 200  # 100 Continue and its like come before the answer
        if self._has_head:
            self._framing_bytes = 0
            self.resume_writing()  # who has answered may read no more: `send` is to look

    def on_body(self, data: bytes) -> None:
        self._framing_bytes = 0
        self._chunks.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > READ_AHEAD_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._has_head:
            self._complete = True
            self._keeps_open = self._parser.should_keep_alive() and not self._until_closed
