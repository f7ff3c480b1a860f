"""A fake engine with a model: its tokens depend on all tokens before them, and its answers have vLLM's shapes.

Texts, stop strings, limits and events follow vLLM 0.32 as far as a client can tell a seeded answer from another.
"""

from __future__ import annotations

import codecs
import zlib
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from engine_fakes import MODEL, FakeEngine

from pdx.wire import Role

CONTEXT_TOKENS = 64
CREATED = {"prefill": 1_111_111_111, "decode": 2_222_222_222}
EOS, SPECIAL = 2, 3
VOCABULARY = (
    b"", b"", b"", b"", b"\xc3", b"\xa9", b" Paris", b"aris", b"##", b"#", b"a", b"ab", b"abc ", b"\n", b" the", b".",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One generated token and what a client sees of it."""

    token: int
    text: str  # not yet held back for stop strings
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def tokens_of(text: str) -> list[int]:
    return [6 + byte % (len(VOCABULARY) - 6) for byte in text.encode()]


def next_token(ids: list[int], body: dict[str, Any], generated: int) -> int:
    if bias := body.get("logit_bias"):
        return int(max(bias, key=lambda token: bias[token]))
    allowed = body.get("allowed_token_ids") or range(2, len(VOCABULARY))
    at_least = body.get("min_tokens") or 0
    fit = [t for t in allowed if generated >= at_least or t not in (EOS, *(body.get("stop_token_ids") or ()))]
    return fit[zlib.crc32(bytes(ids)) % len(fit)]


def generate(prompt: list[int], body: dict[str, Any], limit: int) -> tuple[list[Step], str]:
    """The steps, and the whole text, cut at a stop string."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in prompt:
        decoder.decode(VOCABULARY[token])
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    at_least = body.get("min_tokens") or 0
    steps: list[Step] = []
    text, floor = "", 0
    while True:
        count = len(steps) + 1
        token = next_token([*prompt, *(step.token for step in steps)], body, len(steps))
        ends = (token == EOS and not body.get("ignore_eos")) or token in (body.get("stop_token_ids") or ())
        added = "" if ends else decoder.decode(VOCABULARY[token])
        before, text = len(text), text + added
        if count <= at_least:
            floor = len(text)
        reason: str | None = "stop" if ends else "length" if count == limit else None
        why: int | str | None = token if ends and token != EOS else None
        if count > at_least and not ends:
            for stop in stops:
                found = text.find(stop, max(0, max(before, floor) - len(stop) + 1))
                if found >= 0:
                    cut = found + len(stop) * bool(body.get("include_stop_str_in_output"))
                    text, reason, why = text[:cut], "stop", stop
                    break
        steps.append(Step(token, added, reason, why))
        if reason:
            return steps, text


class ModelEngine(FakeEngine):
    """Answers what the model says. As prefill it reports 2 cached tokens, as decode all but one."""

    def __init__(self, engine_id: str, role: Role, **changed: Any) -> None:
        super().__init__(engine_id, role, **{"context_tokens": CONTEXT_TOKENS, **changed})

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if problem := self._refusal(request.path, body):
            return web.json_response({"error": {"message": problem, "code": 400}}, status=400)
        return await super()._answer(request, body)

    def _prompt_ids(self, path: str, body: dict[str, Any]) -> list[int]:
        chat = path.endswith("/chat/completions")
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids") if chat else body["prompt"]
        if isinstance(given, list):
            return given
        return tokens_of(given or "".join(message["content"] for message in body["messages"]))

    def _limit(self, path: str, body: dict[str, Any]) -> int:
        room = CONTEXT_TOKENS - len(self._prompt_ids(path, body))
        wanted = body.get("max_completion_tokens") if "chat" in path else None
        wanted = wanted if wanted is not None else body.get("max_tokens")
        return min(room, wanted or (room if "chat" in path else 16))

    def _refusal(self, path: str, body: dict[str, Any]) -> str:
        limit = self._limit(path, body)
        if limit < 1:
            return "the prompt is too long"
        if (body.get("max_tokens") or 0) > CONTEXT_TOKENS:
            return "max_tokens is too large"
        return "min_tokens is larger than max_tokens" if (body.get("min_tokens") or 0) > limit else ""

    def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        chat, prompt = "chat" in path, self._prompt_ids(path, body)
        steps, text = generate(prompt, body, self._limit(path, body))
        ids = {"token_ids": [step.token for step in steps] if body.get("return_token_ids") else None}
        shown = prompt if body.get("return_token_ids") else None
        choice: dict[str, Any] = {"index": 0} | (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        )
        choice["logprobs"] = self._logprobs(chat, body, steps, 0)
        choice |= {"finish_reason": steps[-1].finish_reason, "stop_reason": steps[-1].stop_reason, **ids}
        top = {"prompt_token_ids": shown} if chat else {}
        if not chat:
            choice["prompt_token_ids"] = shown
        kind = "chat.completion" if chat else "text_completion"
        head = {**self._head(chat, kind), "choices": [choice], "system_fingerprint": "fake"}
        sends = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
        sent = {"pdx": {"handoff": "00", "pages": 1}} if sends else None
        return {**head, "usage": self._counts(prompt, len(steps)), **top, "kv_transfer_params": sent}

    def _events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        chat, prompt = "chat" in path, self._prompt_ids(path, body)
        steps, whole = generate(prompt, body, self._limit(path, body))
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        held = 0 if body.get("include_stop_str_in_output") else max((len(stop) - 1 for stop in stops), default=0)
        head = self._head(chat, "chat.completion.chunk" if chat else "text_completion")
        events: list[dict[str, Any]] = []
        if chat:
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            events.append({**head, "choices": [first], "prompt_token_ids": None, "prompt_text": None})
        text, shown, offset = "", 0, 0
        for step in steps:
            text += step.text
            end = len(whole) if step.finish_reason else max(shown, len(text) - held)
            delta, shown = (whole if step.finish_reason else text)[shown:end], end
            logprobs = self._logprobs(chat, body, [step], offset)
            offset += len(VOCABULARY[step.token].decode(errors="replace"))
            choice: dict[str, Any] = {"logprobs": logprobs, "finish_reason": step.finish_reason}
            if step.finish_reason or not chat:
                choice["stop_reason"] = step.stop_reason
            if chat:
                choice = {"index": 0, "delta": {"content": delta}, **choice, "token_ids": None}
            else:
                choice = {"index": 0, "text": delta, **choice, "prompt_token_ids": None, "token_ids": None}
            events.append({**head, "choices": [choice]})
        last = {"system_fingerprint": "fake"}
        if (body.get("stream_options") or {}).get("include_usage"):
            return [*events, {**head, "choices": [], "usage": self._counts(prompt, len(steps)), **last}]
        return [*events[:-1], {**events[-1], **last}]

    def _head(self, chat: bool, kind: str) -> dict[str, Any]:
        request_id = self.headers[-1].get("X-Request-Id", "")
        prefix = "chatcmpl" if chat else "cmpl"
        return {"id": f"{prefix}-{request_id}", "object": kind, "created": CREATED[self.role], "model": MODEL}

    def _counts(self, prompt: list[int], generated: int) -> dict[str, Any]:
        total = len(prompt) + generated
        return {**self._usage(prompt), "completion_tokens": generated, "total_tokens": total}

    def _logprobs(self, chat: bool, body: dict[str, Any], steps: list[Step], offset: int) -> dict[str, Any] | None:
        if not body.get("logprobs"):
            return None
        words = [VOCABULARY[step.token].decode(errors="replace") for step in steps]
        values = [-step.token / 100 for step in steps]
        if chat:
            return {"content": [{"token": w, "logprob": v, "bytes": None} for w, v in zip(words, values, strict=True)]}
        offsets = [offset + sum(map(len, words[:n])) for n in range(len(words))]
        tops = [{word: value} for word, value in zip(words, values, strict=True)]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": words, "top_logprobs": tops}
