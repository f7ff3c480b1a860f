"""Cuts decode's stream into events, and rewrites one number in them: usage.prompt_tokens_details.cached_tokens.

(In Anthropic's usage it is cache_read_input_tokens, and what is not cached is input_tokens.)
To the decode engine the whole prompt looks cached, since its KV came by handoff. What the client wants to know is how
much prefill did not have to compute. Every byte but the usage event's passes unchanged, except where a stream goes on
from a seed: then `seed` says what changes.
"""

from __future__ import annotations

import msgspec

from pdx.router.request.seed import DONE, Continuation, Seed

# An event that does not end within this is passed on as it is: no event that the router rewrites is that long.
EVENT_BYTES_MAX = 1 << 20
_DATA = b"data: "
# vLLM's are the first of each; a named engine may be any server of the same API.
_SEPARATORS = (b"\n\n", b"\r\n\r\n")
_DONES = tuple(line + separator for line in (DONE.rstrip(), b"data:[DONE]") for separator in _SEPARATORS)
_LAST = tuple(separator + done for done in _DONES for separator in _SEPARATORS)


class EventStream:
    """Cuts a stream into whole server-sent events, so that one broken off never reaches the client in part.

    `cached_tokens` may still become known while the stream passes. `done`: its [DONE] has passed; the client has all,
    however the connection ends.
    """

    def __init__(self, cached_tokens: int | None, seed: Seed | None = None) -> None:
        self.cached_tokens = cached_tokens
        self._continuation = Continuation(seed) if seed is not None else None
        self._rest = b""
        self.done = False

    def feed(self, chunk: bytes) -> bytes:
        """The events that are whole by now."""
        held = self._rest + chunk
        end = max(at + len(each) if (at := held.rfind(each)) >= 0 else 0 for each in _SEPARATORS)
        if not end and len(held) > EVENT_BYTES_MAX:
            end = len(held)
        passed, self._rest = held[:end], held[end:]
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
        return rest

    def _rewritten(self, event: bytes) -> bytes:
        named, line, _ = event.partition(b"\n") if event.startswith(b"event: ") else (b"", b"", b"")
        head = named + line
        prefix, data = event[len(head) : len(head) + len(_DATA)], event[len(head) + len(_DATA) :]
        if prefix != _DATA or not _tells(data):
            return event
        assert self.cached_tokens is not None
        return head + prefix + with_cached_tokens(data, self.cached_tokens)


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
