"""Cuts decode's stream into events, and rewrites what usage says in them of caches.

That is prompt_tokens_details' cached_tokens and created_cache_tokens; in Anthropic's usage cache_read_input_tokens and
cache_creation_input_tokens, and input_tokens is what neither counts.
To the decode engine the whole prompt looks cached, since its KV came by handoff. What the client wants to know is how
much prefill did not have to compute. Every byte but the usage event's passes unchanged, except where a stream goes on
from a seed: then `seed` says what changes.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pdx.router.request.seed import DONE, Continuation, Seed

# An event that does not end within this is passed on as it is: no event that the router rewrites is that long.
EVENT_BYTES_MAX = 1 << 20
_DATA = b"data: "
# vLLM's are the first of each; a named engine may be any server of the same API.
_SEPARATORS = (b"\n\n", b"\r\n\r\n")
_BEGUN = max(map(len, _SEPARATORS)) - 1  # so much of one may be there before the rest of it comes
_DONES = tuple(line + separator for line in (DONE.rstrip(), b"data:[DONE]") for separator in _SEPARATORS)
_ERROR = re.compile(rb'(?:\A|(?<=\n\n)|(?<=\r\n\r\n))(?:(?P<named>event: ?error\r?\n)|data: ?(?=\{"error"))')
_COMMENTS = re.compile(rb"(?::[^\n]*\n|\r?\n)*+")  # each line in one way only, else it takes time exponential in them
_DATA_LINE = re.compile(rb"^data: ?(.*)$", re.MULTILINE)
_LAST = tuple(separator + done for done in _DONES for separator in _SEPARATORS)
_READ, _CREATION = "cache_read_input_tokens", "cache_creation_input_tokens"


class Cached(msgspec.Struct, frozen=True):
    """Tokens of a prompt that an engine had in its prefix cache, and that it put there: together at most the prompt.

    `created`: None where the engine does not tell it. vLLM does of chats and messages, not of completions.
    """

    tokens: int
    created: int | None = None

    @classmethod
    def of(cls, usage: dict[str, Any]) -> Cached | None:
        """None if it does not tell."""
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            tokens, created = details.get("cached_tokens"), details.get("created_cache_tokens")
        else:
            tokens, created = usage.get(_READ), usage.get(_CREATION)
        return cls(tokens, created if isinstance(created, int) else None) if isinstance(tokens, int) else None


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

    `cached`, prefill's, may still become known while the stream passes. `done`: its [DONE] has passed; the client has
    all, however the connection ends. `error`: the engine has said in the stream that it can't go on; vLLM does, also of
    what a client has done wrong, and then says [DONE] all the same. What came before has passed, the rest never does.
    """

    def __init__(self, cached: Cached | None, seed: Seed | None = None) -> None:
        self.cached = cached
        self._continuation = Continuation(seed) if seed is not None else None
        self._rest = bytearray()  # without a separator
        self._open = False  # the last bytes passed are a part of an event
        self._began = seed is not None  # before, servers may send comments, which are no answer yet
        self.done = False
        self.error: EngineError | None = None

    def feed(self, chunk: bytes) -> bytes:
        """The events that are whole by now."""
        held, fresh = self._rest, max(0, len(self._rest) - _BEGUN)
        held += chunk
        end = max(at + len(each) if (at := held.rfind(each, fresh)) >= 0 else 0 for each in _SEPARATORS)
        if not end and len(held) > EVENT_BYTES_MAX:
            end = len(held)
        if not end:
            return b""
        passed = bytes(held[:end])
        del held[:end]
        if not self._began:
            self._began = not only_comments(passed)
            if not self._began:
                return b""
        if b"error" in passed or self.error is not None:
            passed = self._up_to_error(passed)
        if passed:
            self._open = not passed.endswith(_SEPARATORS)
        # Within an event's JSON newlines are escaped, so that only the event itself can look like this.
        self.done |= passed in _DONES or passed.endswith(_LAST)
        if self._continuation is not None:
            return self._continuation.events(passed)
        if self.cached is None or not _tells(passed):
            return passed
        return b"\n\n".join(self._rewritten(event) for event in passed.split(b"\n\n"))

    def finish(self) -> bytes:
        """What is left when the engine has ended the stream in order."""
        rest, self._rest = bytes(self._rest), bytearray()
        if self.error is not None:
            return b""
        self._open |= bool(rest)
        return rest

    def before_ours(self) -> bytes:
        """What must pass before an event of the router's own, lest it become a part of the engine's last one."""
        return b"\n\n" if self._open else b""

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
        assert self.cached is not None
        return head + prefix + with_cached(data, self.cached)


def only_comments(events: bytes) -> bool:
    """Whether they say nothing: servers keep their clients awake so, also while they can't go on."""
    return events[:1] in b":\r\n" and _COMMENTS.fullmatch(events) is not None


def with_cached(body: bytes, cached: Cached) -> bytes:
    """The JSON object with these numbers, null if not known, where it has such ones; anything else unchanged."""
    try:
        answer = msgspec.json.decode(body)
        usage = answer["usage"]
        new: dict[str, int | None]
        if _READ in usage:
            details, new = usage, {_READ: cached.tokens}
            prompt_tokens = usage["input_tokens"] + usage[_READ] + (usage.get(_CREATION) or 0)
            if _CREATION in usage:
                new[_CREATION] = cached.created
            new["input_tokens"] = max(0, prompt_tokens - cached.tokens - (new.get(_CREATION) or 0))
        else:
            details, new = usage["prompt_tokens_details"], {"cached_tokens": cached.tokens}
            if "created_cache_tokens" in details:
                new["created_cache_tokens"] = cached.created
        if all(details[key] == value for key, value in new.items()):
            return body
    except (msgspec.MsgspecError, ValueError, RecursionError, KeyError, TypeError):
        return body
    details.update(new)
    return msgspec.json.encode(answer)


def _tells(events: bytes) -> bool:
    return b'"cached_tokens"' in events or b'"cache_read_input_tokens"' in events
