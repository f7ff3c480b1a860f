"""Which requests decode can continue from prefill's first token: `UNSEEDABLE_RULES`, with the reason that is counted.

A seeded decode engine takes the first token for a part of the prompt. Whatever looks at the tokens of the *answer*
would see one too few: such requests go to both engines at once instead, and decode makes every token itself. So do
those that decode might refuse after the client has had a token.

Read field by field from the request models of vLLM 0.32. What shapes every token alike is fine: temperature, top_p,
top_k, min_p, logit_bias, allowed_token_ids, stop_token_ids, ignore_eos, and so is what shapes the prompt. `stop` has
no row since the token's text is looked at before it is shown (see `seed`). A field that vLLM 0.32 does not know is
ignored by it, hence no reason, except where its name says that it would guide the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pdx.router.request.servable import CHAT, WITH_IDS, Body, output_limit
from pdx.wire import EngineInfo


class UnseedableRule(NamedTuple):
    """A request for which `applies(path, body, engine)` is true gets every token from decode, for `reason`."""

    reason: str
    applies: Callable[[str, Body, EngineInfo], bool]


UNSEEDABLE_RULES: tuple[UnseedableRule, ...] = (
    # The reply of prefill does not tell the prompt's token ids, with which decode would go on.
    UnseedableRule("endpoint", lambda path, body, engine: path not in WITH_IDS),
    # A grammar starts at the first token of the answer.
    UnseedableRule("structured_output", lambda path, body, engine: _has_grammar(body)),
    # They count the answer's tokens; so do those that a model brings as its defaults. A repetition penalty counts the
    # prompt's as well and alike, so that a default of it is no reason.
    UnseedableRule("penalty", lambda path, body, engine: _has_penalty(body, engine)),
    # A banned word of several tokens is recognized by those before.
    UnseedableRule("bad_words", lambda path, body, engine: bool(body.get("bad_words"))),
    # They may look at anything.
    UnseedableRule("extension", lambda path, body, engine: _any(body, "logits_processors", "vllm_xargs")),
    # The generator would start again with the second token.
    UnseedableRule("seed", lambda path, body, engine: body.get("seed") is not None),
    # Parsers of an answer must see all of it.
    UnseedableRule("tools", lambda path, body, engine: path == CHAT and _has_tools(body)),
    UnseedableRule("reasoning", lambda path, body, engine: path == CHAT and bool(engine.reasoning_parser)),
    # The ids would have to be taken apart and put together over both engines.
    UnseedableRule(
        "token_ids", lambda path, body, engine: _any(body, "return_token_ids", "return_tokens_as_token_ids")
    ),
    # Of the answer's tokens; and a watermark depends on the tokens before.
    UnseedableRule("budget", lambda path, body, engine: body.get("thinking_token_budget") is not None),
    UnseedableRule("pattern", lambda path, body, engine: _any(body, "repetition_detection", "watermarking")),
    # Whether a space goes before a special token depends on whether the one before was special.
    UnseedableRule("special_tokens", lambda path, body, engine: body.get("spaces_between_special_tokens") is False),
    UnseedableRule("routed_experts", lambda path, body, engine: bool(body.get("routed_experts_prompt_start"))),
    # Usage in every event, which the first one would lack.
    UnseedableRule("stream_options", lambda path, body, engine: not _plain_stream(body)),
    # Refused by decode only, since prefill is asked for one token: its words must come before any token.
    UnseedableRule("min_tokens", lambda path, body, engine: not _fulfillable(path, body)),
    UnseedableRule("max_tokens", lambda path, body, engine: _over_limit(path, body, engine)),
)


def unseedable_reason(path: str, body: Body, *engines: EngineInfo) -> str:
    """Why this request can't be continued from a first token at one of these engines; empty if it can."""
    for reason, applies in UNSEEDABLE_RULES:
        for engine in engines:
            if applies(path, body, engine):
                return reason
    return ""


def _any(body: Body, *fields: str) -> bool:
    return any(body.get(field) for field in fields)


def _has_grammar(body: Body) -> bool:
    wanted = body.get("response_format")
    plain = wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text")
    guided = any(field.startswith("guided_") and value is not None for field, value in body.items())
    return not plain or guided or body.get("structured_outputs") is not None


def _has_penalty(body: Body, engine: EngineInfo) -> bool:
    if body.get("repetition_penalty") not in (None, 1):
        return True
    fields = ("presence_penalty", "frequency_penalty")
    given = {field: body.get(field) for field in fields}
    return any(given[f] if given[f] is not None else engine.sampling_defaults.get(f) for f in fields)


def _has_tools(body: Body) -> bool:
    return bool(body.get("tools")) and body.get("tool_choice") != "none"


def _plain_stream(body: Body) -> bool:
    options, interval = body.get("stream_options"), body.get("stream_interval")
    if body.get("stream") not in (None, True, False) or not (interval is None or (_natural(interval) and interval > 0)):
        return False
    if options is None:
        return True
    if not isinstance(options, dict) or options.get("include_usage") not in (None, True, False):
        return False
    return options.get("continuous_usage_stats") in (None, False)


def _fulfillable(path: str, body: Body) -> bool:
    wanted, limit = body.get("min_tokens"), output_limit(path, body)
    return wanted is None or (_natural(wanted) and (limit is None or wanted <= limit))


def _over_limit(path: str, body: Body, engine: EngineInfo) -> bool:
    limit = output_limit(path, body)
    if limit is not None and engine.context_tokens and limit > engine.context_tokens:
        return True
    own = engine.sampling_defaults.get("max_tokens")  # cuts the answer where decode's count, less by one, reaches it
    return own is not None and (limit is None or limit > own)


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0
