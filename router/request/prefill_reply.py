"""What the router reads of prefill's answer: the prompt's token ids, how many were cached, and the first token."""

from __future__ import annotations

from typing import Any

import msgspec

from pdx.router.request.seed import Seed
from pdx.router.request.usage import Cached


class PrefillReply(msgspec.Struct, frozen=True):
    prompt_token_ids: list[int]
    cached: Cached | None
    handed_over: bool  # prefill's connector took part; without it decode would wait for what never comes
    seed: Seed | None = None

    @classmethod
    def read(cls, body: bytes, *, with_ids: bool = True) -> PrefillReply | None:
        """None if the answer is no JSON of that shape or, `with_ids`, carries none."""
        try:
            answer = _decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
        # vLLM puts the ids into the choice for completions, beside the choices for chat.
        ids = answer.prompt_token_ids or (answer.choices[0].prompt_token_ids if answer.choices else None)
        if not ids and with_ids:
            return None
        handed_over = bool((answer.kv_transfer_params or {}).get("pdx"))
        return cls(ids or [], Cached.of(answer.usage or {}), handed_over, _seed(answer))


class _Message(msgspec.Struct):
    role: str = ""
    content: str | None = None


class _Choice(msgspec.Struct):
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    text: str = ""
    message: _Message | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Answer(msgspec.Struct):
    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    usage: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Answer)


def _seed(answer: _Answer) -> Seed | None:
    """The one token, if there is one."""
    if len(answer.choices) != 1:
        return None
    (choice,) = answer.choices
    if not choice.token_ids or len(choice.token_ids) != 1:
        return None
    message = choice.message
    return Seed(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        fingerprint=answer.system_fingerprint,
        role=message.role if message else "",
        token_id=choice.token_ids[0],
        text=(message.content or "") if message else choice.text,
        logprobs=choice.logprobs,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        usage=answer.usage or {},
    )
