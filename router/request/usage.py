"""Cuts decode's stream into events, and rewrites one number in them: usage.prompt_tokens_details.cached_tokens.

(In Anthropic's usage it is cache_read_input_tokens, and what is not cached is input_tokens.)
To the decode engine the whole prompt looks cached, since its KV came by handoff. What the client wants to know is how
much prefill did not have to compute. Every byte but the usage event's passes unchanged, except where a stream goes on
from a seed: then `seed` says what changes.
"""

from __future__ import annotations

import re

import msgspec

from pdx.router.request.seed import DONE, Continuation, Seed

# An event that does not end within this is passed on as it is: no event that the router rewrites is that long.
EVENT_BYTES_MAX = 1 << 20
_DATA = b"data: "
# vLLM's are the first of each; a named engine may be any server of the same API.
_SEPARATORS = (b"\n\n", b"\r\n\r\n")
_DONES = tuple(line + separator for line in (DONE.rstrip(), b"data:[DONE]") for separator in _SEPARATORS)
_ERROR = re.compile(rb'(?:\A|(?<=\n\n)|(?<=\r\n\r\n))(?:(?P<named>event: ?error\r?\n)|data: ?(?=\{"error"))')
_COMMENTS = re.compile(rb"(?:(?::[^\n]*)?\r?\n)*")
_DATA_LINE = re.compile(rb"^data: ?(.*)$", re.MULTILINE)
_LAST = tuple(separator + done for done in _DONES for separator in _SEPARATORS)


class EngineError(msgspec.Struct, frozen=True):
    """What an engine has said in a stream that began with 200: the status that it would have been, and the JSON."""

    code: int
    body: bytes

    @classmethod
    def read(cls, data: bytes, *, named: bool) -> EngineError | None:
        """`named`: an event of that name, which is one whatever its data says. None for what is none."""
        try:
            told = msgspec.json.decode(data)["error"]
        except (msgspec.MsgspecError, ValueError, RecursionError, LookupError, TypeError):
            told = None
        if not told and not named:
            return None
        code = told.get("code") if isinstance(told, dict) else None
        if not isinstance(code, int) or not 400 <= code < 600:
            code = 400 if isinstance(told, dict) and told.get("type") == "invalid_request_error" else 500
        return cls(code, data)


class EventStream:
    """Cuts a stream into whole server-sent events, so that one broken off never reaches the client in part.

    `cached_tokens` may still become known while the stream passes. `done`: its [DONE] has passed; the client has all,
    however the connection ends. `error`: the engine has said in the stream that it can't go on; vLLM does, also of what
    a client has done wrong, and then says [DONE] all the same. What came before has passed, the rest never does.
    """

    def __init__(self, cached_tokens: int | None, seed: Seed | None = None) -> None:
        self.cached_tokens = cached_tokens
        self._continuation = Continuation(seed) if seed is not None else None
        self._rest = b""
        self._began = seed is not None  # before, servers may send comments, which are no answer yet
        self.done = False
        self.error: EngineError | None = None

    def feed(self, chunk: bytes) -> bytes:
        """The events that are whole by now."""
        held = self._rest + chunk
        end = max(at + len(each) if (at := held.rfind(each)) >= 0 else 0 for each in _SEPARATORS)
        if not end and len(held) > EVENT_BYTES_MAX:
            end = len(held)
        passed, self._rest = held[:end], held[end:]
        if not self._began:
            self._began = not only_comments(passed)
            if not self._began:
                return b""
        if b"error" in passed or self.error is not None:
            passed = self._up_to_error(passed)
        # Within an event's JSON newlines are escaped, so that only the event itself can look like this.
        self.done |= passed in _DONES or passed.endswith(_LAST)
        if self._continuation is not None:
            return self._continuation.events(passed)
        if self.cached_tokens is None or not _tells(passed):
            return passed
        return b"\n\n".join(self._rewritten(event) for event in passed.split(b"\n\n"))

    def finish(self) -> bytes:
        """What is left when the engine has ended the stream in order."""
        rest, self._rest = self._rest, b""
        return b"" if self.error is not None else rest

    def _up_to_error(self, events: bytes) -> bytes:
        if self.error is not None:
            return b""
        for found in _ERROR.finditer(events):
            data = _DATA_LINE.search(events, found.start())
            self.error = EngineError.read(data[1] if data is not None else b"", named=bool(found["named"]))
            if self.error is not None:
                return events[: found.start()]
        return events

    def _rewritten(self, event: bytes) -> bytes:
        named, line, _ = event.partition(b"\n") if event.startswith(b"event: ") else (b"", b"", b"")
        head = named + line
        prefix, data = event[len(head) : len(head) + len(_DATA)], event[len(head) + len(_DATA) :]
        if prefix != _DATA or not _tells(data):
            return event
        assert self.cached_tokens is not None
        return head + prefix + with_cached_tokens(data, self.cached_tokens)


def only_comments(events: bytes) -> bool:
    """Whether they say nothing: servers keep their clients awake so, also while they can't go on."""
    return events[:1] in b":\r\n" and _COMMENTS.fullmatch(events) is not None


def with_cached_tokens(body: bytes, cached_tokens: int) -> bytes:
    """The JSON object with this number where it has one; anything else unchanged."""
    try:
        answer = msgspec.json.decode(body)
        usage = answer["usage"]
        if "cache_read_input_tokens" in usage:
            prompt_tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
            new = {"input_tokens": prompt_tokens - cached_tokens, "cache_read_input_tokens": cached_tokens}
            details = usage
        else:
            new = {"cached_tokens": cached_tokens}
            details = usage["prompt_tokens_details"]
        if all(details[key] == value for key, value in new.items()):
            return body
    except (msgspec.MsgspecError, ValueError, RecursionError, KeyError, TypeError):
        return body
    details.update(new)
    return msgspec.json.encode(answer)


def _tells(events: bytes) -> bool:
    return b'"cached_tokens"' in events or b'"cache_read_input_tokens"' in events
