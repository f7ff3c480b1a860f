"""What the router reads of prefill's answer: the prompt's token ids, and how many of them prefill had cached."""

from __future__ import annotations

import msgspec


class PrefillReply(msgspec.Struct, frozen=True):
    prompt_token_ids: list[int]
    cached_tokens: int | None

    @classmethod
    def read(cls, body: bytes) -> PrefillReply | None:
        """None if the answer is no JSON of that shape or carries no ids."""
        try:
            answer = _decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
        # vLLM puts the ids into the choice for completions, beside the choices for chat.
        ids = answer.prompt_token_ids or (answer.choices[0].prompt_token_ids if answer.choices else None)
        details = answer.usage.prompt_tokens_details if answer.usage else None
        return cls(ids, details.cached_tokens if details else None) if ids else None


class _Choice(msgspec.Struct):
    prompt_token_ids: list[int] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Answer)
