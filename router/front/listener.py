"""An HTTP server that can be left open to anybody: what is no HTTP gets a 400 in our words and is counted, not logged.

aiohttp's low-level server with one handler, so that no routing or middleware lies between a connection and the front.
Heads are bounded in lines, bytes and time, bodies in bytes; the time of a body is the front's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader

from pdx.router.front.replies import error_body

HEADER_BYTES_MAX = 16 << 10  # of one header, and of the request line
HEADERS_MAX = 128
LINGER_S = 2.0  # how long the rest of a refused body is read, so that the client gets to see the refusal

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Listener(web.Server):
    """Serves `handler`; tells `malformed` of each request that could not be read, with its status.

    `idle_s`: a connection without a whole head for so long is closed, whether it is silent or slow.
    """

    def __init__(
        self, handler: Handler, *, malformed: Callable[[int], None], body_bytes_max: int, idle_s: float
    ) -> None:
        super().__init__(
            handler,
            request_factory=self._request,
            handler_cancellation=True,  # a client that leaves ends its request's task, and with it the upstream calls
            access_log=None,
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            max_headers=HEADERS_MAX,
            keepalive_timeout=idle_s,
            lingering_time=LINGER_S,
        )
        self.malformed = malformed
        self._body_bytes_max = body_bytes_max

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message, payload, protocol, writer, task, self._loop, client_max_size=self._body_bytes_max
        )


class _Connection(web.RequestHandler):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """A body that goes on as no HTTP never ends: who reads it is told at once, not when its time is up.

        (aiohttp puts the error behind the request, as if it were the next one; before this one's end there is no next.)
        """
        super().data_received(data)
        reading = self._current_request
        if reading is not None and self._messages and not reading.content.is_eof():
            reading.content.set_exception(web.RequestPayloadError("the body goes on as no HTTP"))

    def log_exception(self, *args: object, **more: object) -> None:
        """But for the rest of a body that can't be read: the fault is the client's."""
        if not isinstance(more.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **more)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Only of what is no HTTP: the handler answers for its own errors."""
        assert isinstance(self._manager, Listener)
        self._manager.malformed(status)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        body = error_body(status, "the request is not HTTP that this router reads")
        answer = web.Response(status=status, body=body, content_type="application/json")
        answer.force_close()
        return answer
