"""One request of a chaos client: everything that came back, however it ended, and always within a deadline."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LINE_BYTES_MAX = 1 << 20


@dataclass
class Heard:
    """What came back. `status` 0: no response at all."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None  # of an answer that is not a stream, if it is a JSON object
    events: list[dict[str, Any]] = field(default_factory=list)  # of a stream
    done: bool = False  # a stream's [DONE], or the whole of a body
    refused: bool = False  # nobody listens there
    broken: str = ""  # how the connection broke
    seconds: float = 0.0

    @property
    def text(self) -> str:
        choices = [(event.get("choices") or [{}])[0] for event in ([self.body] if self.body else self.events)]
        pieces = [c.get("text") or (c.get("message") or c.get("delta") or {}).get("content") for c in choices]
        return "".join(piece or "" for piece in pieces)

    @property
    def finish_reason(self) -> str:
        reasons = [
            choice["finish_reason"]
            for event in ([self.body] if self.body else self.events)
            for choice in event.get("choices") or []
            if choice.get("finish_reason")
        ]
        return str(reasons[-1]) if reasons else ""

    @property
    def usage(self) -> dict[str, Any]:
        told = [event["usage"] for event in ([self.body] if self.body else self.events) if event.get("usage")]
        return told[-1] if told else {}

    @property
    def error(self) -> str:
        """The message of an error body or an error event in OpenAI's shape; empty if there is none."""
        for event in [self.body] if self.body else self.events:
            if isinstance(error := event.get("error"), dict):
                return str(error.get("message") or error)
        return ""


class Call:
    """One POST. `run` belongs to one thread; `leave` may come from another."""

    def __init__(
        self, url: str, body: dict[str, Any], *, deadline_s: float, on_token: Callable[[], None] = lambda: None
    ) -> None:
        self.left = False
        self.tokens_seen = 0
        self._url = url
        self._body = body
        self._deadline_s = deadline_s
        self._on_token = on_token
        self._socket: socket.socket | None = None
        self._ends_at = 0.0

    def run(self) -> Heard:
        """Never raises for what network or server do."""
        begun = time.monotonic()
        self._ends_at = begun + self._deadline_s
        heard = Heard()
        target = urlsplit(self._url)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=self._deadline_s)
        try:
            connection.connect()
            self._socket = connection.sock
            connection.request("POST", target.path, json.dumps(self._body), {"Content-Type": "application/json"})
            self._read(connection, heard)
        except ConnectionRefusedError:
            heard.refused = True
        except (OSError, http.client.HTTPException, ValueError) as error:
            heard.broken = repr(error)
        finally:
            self._socket = None
            connection.close()
        heard.seconds = time.monotonic() - begun
        return heard

    def leave(self) -> bool:
        """As a client that closes its window. False: it was not connected."""
        connected = self._socket
        if connected is None:
            return False
        self.left = True
        with contextlib.suppress(OSError):  # it has ended just now
            connected.shutdown(socket.SHUT_RDWR)
        return True

    def _read(self, connection: http.client.HTTPConnection, heard: Heard) -> None:
        response = connection.getresponse()
        heard.status = response.status
        heard.headers = {key.lower(): value for key, value in response.getheaders()}
        if not heard.headers.get("content-type", "").startswith("text/event-stream"):
            self._shorten()
            content = json.loads(response.read())
            heard.body = content if isinstance(content, dict) else None
            heard.done = True
            return
        while not heard.done:
            self._shorten()
            line = response.readline(LINE_BYTES_MAX)
            if not line:
                heard.broken = "the stream ended without [DONE]"
                return
            if line.startswith(b"data: "):
                self._take(line[6:].strip(), heard)

    def _take(self, data: bytes, heard: Heard) -> None:
        if data == b"[DONE]":
            heard.done = True
            return
        heard.events.append(json.loads(data))
        if heard.events[-1].get("choices"):
            self.tokens_seen += 1
            self._on_token()

    def _shorten(self) -> None:
        """The deadline is of the whole call, sockets know only one for each read."""
        left_s = self._ends_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("past the deadline")
        if self._socket is not None:
            self._socket.settimeout(left_s)
