"""Prefill's first token: when it can be streamed before decode has begun, and how one answer is made of both.

A seeded decode engine sees the token as the last of its prompt. So its answer lacks the token, counts a prompt longer
by one, and begins anew what a client must see once: the role, the time of creation, the offsets into the text. This
module puts that right, with the shapes of vLLM 0.32. It knows bytes of answers; nothing of engines or handoffs.
"""

from __future__ import annotations

from typing import Any

import msgspec

UNFINISHED = "\ufffd"  # what a tokenizer shows for a part of a character
DONE = b"data: [DONE]\n\n"

_PREFIX = b"data: "


class Seed(msgspec.Struct, frozen=True, kw_only=True):
    """One token of an answer, with all of prefill's reply that the client may get to see."""

    id: str
    created: int
    model: str
    fingerprint: str | None
    role: str  # empty for completions
    token_id: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None  # "length" says only that prefill was asked for one token
    stop_reason: int | str | None
    usage: dict[str, Any]

    @property
    def chat(self) -> bool:
        return bool(self.role)

    def is_all(self, limit: int | None, room: int) -> bool:
        """Whether an answer of at most so many tokens, for which there is so much room, ends with this one."""
        if self.finish_reason == "length":
            return limit == 1 or room == 1
        return self.finish_reason == "stop"

    def unusable(self, stop: object) -> str:
        """Why decode must compute this token itself before the client sees anything; empty if it need not."""
        if self.finish_reason != "length":
            return "seed_finish"
        # A special token that is not shown, or a part of a character, whose text comes with the tokens after it.
        if not self.text or UNFINISHED in self.text:
            return "seed_text"
        strings = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
        # A stop string that lies within the token has ended the answer at prefill.
        if any(straddles(self.text, string) for string in strings):
            return "seed_stop"
        return ""

    def opening(self) -> bytes:
        """The events with which a stream begins whose next token comes from decode."""
        return self._events(finish_reason=None)

    def stream(self, *, usage: bool) -> bytes:
        """The whole stream of an answer that ends with this token."""
        if not usage:
            return self._events(finish_reason=self.finish_reason, fingerprint=self.fingerprint) + DONE
        shown = {**self._head(), "choices": [], "usage": _without_nulls(self.usage)}
        if self.fingerprint is not None:
            shown["system_fingerprint"] = self.fingerprint
        return self._events(finish_reason=self.finish_reason) + _event(shown) + DONE

    def merged(self, body: bytes) -> bytes | None:
        """Decode's whole answer with this token before it; None if it has another shape."""
        try:
            answer = msgspec.json.decode(body)
            (choice,) = answer["choices"]
            if self.chat:
                choice["message"]["content"] = self.text + (choice["message"]["content"] or "")
            else:
                choice["text"] = self.text + choice["text"]
            if self.logprobs and choice.get("logprobs"):
                theirs = self.shifted(choice["logprobs"])
                choice["logprobs"] = {k: v + theirs[k] if isinstance(v, list) else v for k, v in self.logprobs.items()}
            answer["created"] = self.created
            self.count_in(answer["usage"])
        except (msgspec.MsgspecError, ValueError, RecursionError, KeyError, TypeError):
            return None
        return msgspec.json.encode(answer)

    def count_in(self, usage: dict[str, Any]) -> None:
        """Moves this token from decode's prompt to its answer. The total stays."""
        usage["prompt_tokens"] -= 1
        usage["completion_tokens"] += 1
        details, ours = usage.get("prompt_tokens_details"), self.usage.get("prompt_tokens_details")
        for told in ("cached_tokens", "created_cache_tokens"):
            if details and ours and told in details:
                details[told] = ours.get(told)

    def shifted(self, logprobs: dict[str, Any]) -> dict[str, Any]:
        """Decode's log-probs with offsets that count from where this token begins; chat's have none."""
        ours = (self.logprobs or {}).get("tokens")
        if not ours or "text_offset" not in logprobs:
            return logprobs
        return {**logprobs, "text_offset": [offset + len(ours[-1]) for offset in logprobs["text_offset"]]}

    def _events(self, *, finish_reason: str | None, fingerprint: str | None = None) -> bytes:
        """vLLM's event of one token, for chat behind the one with the role."""
        choice: dict[str, Any] = {"logprobs": self.logprobs, "finish_reason": finish_reason}
        if finish_reason is not None or not self.chat:
            choice["stop_reason"] = self.stop_reason
        last = {} if fingerprint is None else {"system_fingerprint": fingerprint}
        if not self.chat:
            choice = {"index": 0, "text": self.text, **choice, "prompt_token_ids": None, "token_ids": None}
            return _event({**self._head(), "choices": [choice], **last})
        choice = {"index": 0, "delta": {"content": self.text}, **choice, "token_ids": None}
        first = {"index": 0, "delta": {"role": self.role, "content": ""}, "logprobs": None, "finish_reason": None}
        opened = _event({**self._head(), "choices": [first], "prompt_token_ids": None, "prompt_text": None})
        return opened + _event({**self._head(), "choices": [choice], **last})

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Continuation:
    """Decode's stream, rewritten to go on where the seed has ended. Whole events in, whole events out."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed
        self._created: tuple[bytes, bytes] | None = None  # as decode writes it, and as the client has it

    def events(self, passed: bytes) -> bytes:
        if self._created is None or b'"completion_tokens"' in passed or b'"text_offset"' in passed:
            events = [self._rewritten(event) for event in passed.split(b"\n\n")]
            passed = b"\n\n".join(event for event in events if event is not None)
        # Within a JSON string the quotes would be escaped, so that only the field itself can look like this.
        return passed.replace(*self._created) if self._created else passed

    def _rewritten(self, event: bytes) -> bytes | None:
        """None drops the event: the role is there already. What has another shape than vLLM's passes as it is."""
        if not event.startswith(_PREFIX):
            return event
        try:
            return self._goes_on(event, msgspec.json.decode(event[len(_PREFIX) :]))
        except (msgspec.MsgspecError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return event

    def _goes_on(self, event: bytes, chunk: Any) -> bytes | None:
        if self._created is None and "created" in chunk:
            self._created = (b'"created":%d,' % chunk["created"], b'"created":%d,' % self._seed.created)
            if self._seed.chat and "role" in chunk["choices"][0]["delta"]:
                return None
        changed = False
        for choice in chunk["choices"]:
            if choice.get("logprobs") and not self._seed.chat:
                choice["logprobs"] = self._seed.shifted(choice["logprobs"])
                changed = True
        if chunk.get("usage"):
            self._seed.count_in(chunk["usage"])
            changed = True
        return _PREFIX + msgspec.json.encode(chunk) if changed else event


def own_answer(body: bytes) -> bytes:
    """Prefill's reply as the client's answer: without the ids that only the router asked for."""
    answer = msgspec.json.decode(body)
    for part in (answer, *answer["choices"]):
        for field in ("prompt_token_ids", "token_ids", "kv_transfer_params"):
            if field in part:
                part[field] = None
    return msgspec.json.encode(answer)


def straddles(text: str, stop: object) -> bool:
    """Whether `stop` may begin in `text` and end behind it."""
    if not isinstance(stop, str):
        return False
    return any(stop.startswith(text[-size:]) for size in range(1, min(len(text), len(stop) - 1) + 1))


def _event(chunk: dict[str, Any]) -> bytes:
    return _PREFIX + msgspec.json.encode(chunk) + b"\n\n"


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_nulls(v) if isinstance(v, dict) else v for k, v in value.items() if v is not None}
