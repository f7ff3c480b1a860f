"""What a pair of engines can serve, and how a request's body is rewritten for each of the two.

Two tables: `ALONE_RULES` (requests that go to one engine whole, with the reason shown to the client and counted) and
`PREFILL_FIELDS` (how prefill's copy differs from the client's body). Knows the OpenAI-compatible bodies of vLLM 0.32;
knows nothing of engines, handoffs under way or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Body = Mapping[str, Any]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"  # Anthropic's: the engines make a chat of it
WITH_IDS = (COMPLETIONS, CHAT)  # whose replies can tell the prompt's token ids
PAIRED = (*WITH_IDS, MESSAGES)
COMPLETION_TOKENS = 16  # vLLM's limit for completions that give none

# Fields by which routers steer engines. From a client they are stripped: it could name handoffs that are not its own.
PRIVATE_FIELDS = ("kv_transfer_params", "ec_transfer_params")

# Content parts from which the engines render a text prompt; everything else carries media, whose processing the token
# ids that prefill returns do not cover.
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
_TEXT_BLOCKS = frozenset({"text", "tool_use", "tool_result", "thinking", "redacted_thinking"})
_MEDIA_MARKS = ("image", "audio", "video", "embeds")


class AloneRule(NamedTuple):
    """A request for which `applies(path, body)` is true is not paired, for `reason`."""

    reason: str
    applies: Callable[[str, Body], bool]


ALONE_RULES: tuple[AloneRule, ...] = (
    # Embeddings, tokenizing ...: no generation. Responses: one may be several of the engine's, with tools between them.
    AloneRule("endpoint", lambda path, body: path not in PAIRED),
    # Several sequences of one request: prefill would send KV once, the decode engine would ask for it n times.
    AloneRule("n", lambda path, body: body.get("n") not in (None, 1)),
    AloneRule("best_of", lambda path, body: body.get("best_of") not in (None, 1)),
    AloneRule("beam_search", lambda path, body: bool(body.get("use_beam_search"))),
    # A list of prompts becomes several engine requests, and one handle names one.
    AloneRule("several_prompts", lambda path, body: path == COMPLETIONS and _prompts(body) != 1),
    AloneRule("prompt_embeds", lambda path, body: body.get("prompt_embeds") is not None),
    # The engine that answers must have the prompt's text, or its logits, itself.
    AloneRule("echo", lambda path, body: bool(body.get("echo"))),
    AloneRule("prompt_logprobs", lambda path, body: body.get("prompt_logprobs") is not None),
    AloneRule("prompt_text", lambda path, body: bool(body.get("return_prompt_text"))),
    # Fill-in-the-middle is rendered from text only, and the decode side of a pair gets token ids.
    AloneRule("suffix", lambda path, body: path == COMPLETIONS and body.get("suffix") is not None),
    # -1 cuts to what max_tokens leaves room for, and prefill's max_tokens is another.
    AloneRule("truncation", lambda path, body: not _none_or_positive(body.get("truncate_prompt_tokens"))),
    # Zero, negative or malformed: let one engine say what is wrong with it, in its own words.
    AloneRule(
        "max_tokens",
        lambda path, body: not all(_none_or_positive(body.get(f)) for f in ("max_tokens", "max_completion_tokens")),
    ),
    AloneRule("multimodal", lambda path, body: path == CHAT and _has_media(body.get("messages"))),
    AloneRule("multimodal", lambda path, body: path == MESSAGES and _has_other_blocks(body.get("messages"))),
)


class FieldRule(NamedTuple):
    """What becomes of one field in prefill's copy. Fields without a rule are kept."""

    field: str
    action: str  # "set", "cap" (numbers above the value), "drop" or "keep"
    value: Any = None
    paths: tuple[str, ...] = WITH_IDS


PREFILL_FIELDS: tuple[FieldRule, ...] = (
    FieldRule("max_tokens", "set", 1, paths=PAIRED),
    FieldRule("max_completion_tokens", "set", 1, paths=(CHAT,)),  # it would win over max_tokens
    FieldRule("stream", "set", False, paths=PAIRED),
    FieldRule("return_token_ids", "set", True),
    # Refused by the engine without stream=true.
    FieldRule("stream_options", "drop"),
    FieldRule("stream_interval", "drop"),
    FieldRule("min_tokens", "cap", 1),  # refused if larger than max_tokens; one token is what it can say of the first
    FieldRule("return_tokens_as_token_ids", "drop"),
    # Compiling a grammar would delay the forward pass, and it is not part of the prompt.
    FieldRule("structured_outputs", "drop"),
    # These reach the chat template, hence the prompt, or the block hashes.
    FieldRule("response_format", "keep"),
    FieldRule("tools", "keep"),
    FieldRule("tool_choice", "keep"),
    FieldRule("reasoning_effort", "keep"),
    FieldRule("chat_template", "keep"),
    FieldRule("chat_template_kwargs", "keep"),
    FieldRule("continue_final_message", "keep"),
    FieldRule("add_generation_prompt", "keep"),
    FieldRule("add_special_tokens", "keep"),
    FieldRule("documents", "keep"),
    FieldRule("truncate_prompt_tokens", "keep"),
    FieldRule("cache_salt", "keep"),
    FieldRule("priority", "keep"),
    # These shape the first token, which the client may get from prefill.
    FieldRule("ignore_eos", "keep"),
    FieldRule("stop", "keep"),
    FieldRule("stop_token_ids", "keep"),
    FieldRule("logit_bias", "keep"),
    FieldRule("allowed_token_ids", "keep"),
    FieldRule("logprobs", "keep"),
    FieldRule("top_logprobs", "keep"),
    FieldRule("logprob_token_ids", "keep"),
)


def alone_reason(path: str, body: Body) -> str | None:
    """Why this request can't be split over two engines, or None if it can."""
    return next((rule.reason for rule in ALONE_RULES if rule.applies(path, body)), None)


def without_private(body: Body) -> tuple[dict[str, Any], bool]:
    """The body without fields that only routers may set, wherever engines look for them, and whether any was there."""
    public = {field: value for field, value in body.items() if field not in PRIVATE_FIELDS}
    extra = public.get("vllm_xargs")  # of which vLLM makes the same as of fields of these names
    if isinstance(extra, dict) and not extra.keys().isdisjoint(PRIVATE_FIELDS):
        public["vllm_xargs"] = {name: value for name, value in extra.items() if name not in PRIVATE_FIELDS}
        return public, True
    return public, len(public) != len(body)


def prefill_body(path: str, body: Body, handle: str, prompt_token_ids: list[int] | None = None) -> dict[str, Any]:
    """What prefill is asked: the same prompt, one token, not streamed, the prompt's token ids in the reply.

    A completion's ids stand for its text, which is so tokenized once. A chat's do not: tools, reasoning effort and
    formats of answers may go into its prompt by ways that no other endpoint has, so prefill makes its own.
    """
    copy = dict(body)
    if prompt_token_ids is not None and path == COMPLETIONS:
        copy["prompt"] = prompt_token_ids
    for rule in PREFILL_FIELDS:
        if path not in rule.paths:
            continue
        if rule.action == "drop":
            copy.pop(rule.field, None)
        elif rule.action == "set":
            copy[rule.field] = rule.value
        elif rule.action == "cap" and type(copy.get(rule.field)) is int:
            copy[rule.field] = min(copy[rule.field], rule.value)
    copy["kv_transfer_params"] = {"do_remote_decode": True, "pdx_handle": handle}
    return copy


def decode_body(path: str, body: Body, handle: str, prompt_token_ids: list[int]) -> dict[str, Any]:
    """What the decode engine is asked after prefill: the client's body with prefill's ids: one prompt for both."""
    params = {"do_remote_prefill": True, "pdx_handle": handle}
    return _with_ids(path, body, params, prompt_token_ids)


def early_body(body: Body, handle: str) -> dict[str, Any]:
    """What the decode engine is asked beside prefill: it finds the token ids itself, and compares."""
    return {**body, "kv_transfer_params": {"do_remote_prefill": True, "pdx_handle": handle, "pdx_early": True}}


def seeded_body(path: str, body: Body, handle: str, prompt_token_ids: list[int], seed_token_id: int) -> dict[str, Any]:
    """What the decode engine is asked to go on from prefill's token, which counts as one of the answer's.

    Without a handle, the engine computes the whole prompt itself.
    """
    params = {"do_remote_prefill": True, "pdx_handle": handle, "pdx_tokens": len(prompt_token_ids)} if handle else {}
    copy = _with_ids(path, body, params, [*prompt_token_ids, seed_token_id])
    limit = output_limit(path, body)
    copy.pop("max_completion_tokens", None)
    if limit is not None:
        copy["max_tokens"] = limit - 1
    if body.get("min_tokens"):
        copy["min_tokens"] = body["min_tokens"] - 1
    for field in ("truncate_prompt_tokens", "truncation_side"):  # the ids are cut already; one more would be lost now
        copy.pop(field, None)
    return copy


def output_limit(path: str, body: Body) -> int | None:
    """How many tokens the client wants at most, as vLLM reads it; None: as many as there is room for."""
    if path == COMPLETIONS:
        return body.get("max_tokens") or COMPLETION_TOKENS
    limit = body.get("max_completion_tokens")
    return limit if limit is not None else body.get("max_tokens")


def _with_ids(path: str, body: Body, params: dict[str, Any], prompt_token_ids: list[int]) -> dict[str, Any]:
    """vLLM takes the ids from kv_transfer_params for chat only; a completion's prompt may be token ids by itself."""
    if path == CHAT:
        return {**body, "kv_transfer_params": {**params, "prompt_token_ids": prompt_token_ids}}
    copy = {**body, "prompt": prompt_token_ids}
    return {**copy, "kv_transfer_params": params} if params else copy


def _prompts(body: Body) -> int:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _none_or_positive(value: object) -> bool:
    return value is None or (type(value) is int and value > 0)


def _has_media(messages: object) -> bool:
    if not isinstance(messages, list):
        return False
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return any(_is_media(part) for content in contents if isinstance(content, list) for part in content)


def _has_other_blocks(content: object) -> bool:
    """Whether one of Anthropic's messages has blocks that are no text: images, documents, also in a tool's result."""
    left = [content]  # not by recursion: JSON may be as deep as Python's stack
    while left:
        each = left.pop()
        if isinstance(each, list):
            left.extend(each)
        elif isinstance(each, dict):
            kind = each.get("type", "text")
            if not isinstance(kind, str) or kind not in _TEXT_BLOCKS:
                return True
            left.append(each.get("content"))
    return False


def _is_media(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type", "text")
    return (
        not isinstance(kind, str)
        or kind not in _TEXT_PARTS
        or any(mark in key for key in part for mark in _MEDIA_MARKS)
    )
