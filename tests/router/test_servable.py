"""Both tables of what a pair can serve, one row each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdx.router.request.servable import (
    ALONE_RULES,
    CHAT,
    COMPLETIONS,
    PREFILL_FIELDS,
    FieldRule,
    alone_reason,
    decode_body,
    early_body,
    output_limit,
    prefill_body,
    seeded_body,
    without_private,
)

PROMPT = {"model": "m", "prompt": "x"}
MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat_with(*parts: object) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


ALONE: list[tuple[str, str, dict[str, Any]]] = [
    ("endpoint", "/v1/embeddings", {"model": "m", "input": "x"}),
    ("endpoint", "/v1/completions/render", PROMPT),
    ("n", COMPLETIONS, {**PROMPT, "n": 2}),
    ("n", CHAT, {**MESSAGES, "n": "two"}),
    ("best_of", COMPLETIONS, {**PROMPT, "best_of": 3}),
    ("beam_search", CHAT, {**MESSAGES, "use_beam_search": True}),
    ("several_prompts", COMPLETIONS, {"model": "m", "prompt": ["a", "b"]}),
    ("several_prompts", COMPLETIONS, {"model": "m", "prompt": [[1, 2], [3]]}),
    ("prompt_embeds", COMPLETIONS, {"model": "m", "prompt_embeds": "AAAA"}),
    ("echo", COMPLETIONS, {**PROMPT, "echo": True}),
    ("prompt_logprobs", CHAT, {**MESSAGES, "prompt_logprobs": 0}),
    ("prompt_text", CHAT, {**MESSAGES, "return_prompt_text": True}),
    ("suffix", COMPLETIONS, {**PROMPT, "suffix": "y"}),
    ("truncation", COMPLETIONS, {**PROMPT, "truncate_prompt_tokens": -1}),
    ("max_tokens", COMPLETIONS, {**PROMPT, "max_tokens": 0}),
    ("max_tokens", CHAT, {**MESSAGES, "max_completion_tokens": "many"}),
    ("multimodal", CHAT, chat_with({"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}})),
    ("multimodal", CHAT, chat_with({"image_url": "u"})),
    ("multimodal", CHAT, chat_with({"type": "input_audio", "input_audio": {}})),
    ("multimodal", CHAT, chat_with({"type": ["text"]})),
    ("multimodal", "/v1/messages", chat_with({"type": "image", "source": {}})),
    ("multimodal", "/v1/messages", chat_with({"type": "tool_result", "content": [{"type": "document"}]})),
    ("max_tokens", "/v1/messages", {**MESSAGES, "max_tokens": -1}),
    ("endpoint", "/v1/messages/count_tokens", MESSAGES),
    ("endpoint", "/v1/responses", {"model": "m", "input": "x"}),
    ("multimodal", "/v1/messages", chat_with({"type": ["text"]})),
]

PAIRED: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, PROMPT),
    (COMPLETIONS, {"model": "m", "prompt": [1, 2, 3]}),
    (COMPLETIONS, {"model": "m", "prompt": ["one"]}),
    (COMPLETIONS, {"model": "m"}),  # malformed: prefill's 400 is the client's
    (COMPLETIONS, {**PROMPT, "n": 1, "best_of": 1, "echo": False, "suffix": None, "max_tokens": None}),
    (COMPLETIONS, {**PROMPT, "truncate_prompt_tokens": 100, "stream": True, "logprobs": 5}),
    (CHAT, MESSAGES),
    (CHAT, chat_with({"type": "text", "text": "x"}, "bare", {"text": "y"})),
    (CHAT, {**MESSAGES, "tools": [{}], "tool_choice": "required", "response_format": {"type": "json_object"}}),
    (CHAT, {"model": "m", "messages": "nonsense"}),
    ("/v1/messages", MESSAGES),
    ("/v1/messages", {**chat_with({"type": "text"}, {"type": "tool_result", "content": "x"}), "tools": [{}]}),
    ("/v1/messages", {"model": "m", "messages": [7, None, {"content": [[], 8]}]}),
]


@pytest.mark.parametrize(("reason", "path", "body"), ALONE)
def test_alone(reason: str, path: str, body: dict[str, Any]) -> None:
    assert alone_reason(path, body) == reason


@pytest.mark.parametrize(("path", "body"), PAIRED)
def test_paired(path: str, body: dict[str, Any]) -> None:
    assert alone_reason(path, body) is None


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/messages"])
def test_deep_messages_are_the_engines_to_refuse(path: str) -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    assert alone_reason(path, {"model": "m", "messages": [{"role": "user", "content": deep}]}) is None


def test_every_alone_rule_has_a_row() -> None:
    assert {rule.reason for rule in ALONE_RULES} == {reason for reason, _, _ in ALONE}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("rule", PREFILL_FIELDS, ids=lambda rule: rule.field)
def test_prefill_field(rule: FieldRule, path: str) -> None:
    given = 7 if rule.action == "cap" else object()
    copy = prefill_body(path, {rule.field: given}, "h")
    if rule.action == "keep" or path not in rule.paths:
        assert copy[rule.field] is given
    elif rule.action == "drop":
        assert rule.field not in copy
    else:
        assert copy[rule.field] == rule.value


def test_prefill_copy_leaves_the_clients_body_alone() -> None:
    body = {**PROMPT, "stream": True, "min_tokens": 5, "temperature": 0.5}
    copy = prefill_body(COMPLETIONS, body, "h")
    assert body["stream"] is True
    assert copy["temperature"] == 0.5
    assert copy["kv_transfer_params"] == {"do_remote_decode": True, "pdx_handle": "h"}


def test_decode_gets_prefills_token_ids() -> None:
    completion = decode_body(COMPLETIONS, PROMPT, "h", [1, 2])
    assert completion["prompt"] == [1, 2]
    assert completion["kv_transfer_params"] == {"do_remote_prefill": True, "pdx_handle": "h"}
    chat = decode_body(CHAT, MESSAGES, "h", [1, 2])
    assert chat["messages"] == MESSAGES["messages"]
    assert chat["kv_transfer_params"] == {"do_remote_prefill": True, "pdx_handle": "h", "prompt_token_ids": [1, 2]}


def test_min_tokens_are_capped_and_nonsense_is_left_to_the_engine() -> None:
    for given, asked in ((0, 0), (1, 1), (9, 1), ("nine", "nine")):
        assert prefill_body(COMPLETIONS, {**PROMPT, "min_tokens": given}, "h")["min_tokens"] == asked


def test_decode_beside_prefill_gets_the_clients_body() -> None:
    params = {"do_remote_prefill": True, "pdx_handle": "h", "pdx_early": True}
    assert early_body(MESSAGES, "h") == {**MESSAGES, "kv_transfer_params": params}


@pytest.mark.parametrize(
    ("path", "given", "limit"),
    [
        (COMPLETIONS, {}, 16),
        (COMPLETIONS, {"max_tokens": None}, 16),
        (COMPLETIONS, {"max_tokens": 5}, 5),
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, 5),
    ],
)
def test_limit_of_the_answer(path: str, given: dict[str, Any], limit: int | None) -> None:
    assert output_limit(path, given) == limit
    seeded = seeded_body(path, {**given, "min_tokens": 3, "truncate_prompt_tokens": 2}, "h", [1, 2], 9)
    assert seeded.get("max_tokens") == (limit - 1 if limit else None)
    assert seeded["min_tokens"] == 2
    assert not {"max_completion_tokens", "truncate_prompt_tokens"} & set(seeded)


def test_decode_goes_on_from_prefills_token() -> None:
    params = {"do_remote_prefill": True, "pdx_handle": "h", "pdx_tokens": 2}
    completion = seeded_body(COMPLETIONS, PROMPT, "h", [1, 2], 9)
    assert (completion["prompt"], completion["kv_transfer_params"]) == ([1, 2, 9], params)
    chat = seeded_body(CHAT, MESSAGES, "h", [1, 2], 9)
    assert chat == {**MESSAGES, "kv_transfer_params": {**params, "prompt_token_ids": [1, 2, 9]}}
    assert "kv_transfer_params" not in seeded_body(COMPLETIONS, PROMPT, "", [1, 2], 9)
    assert seeded_body(CHAT, MESSAGES, "", [1], 9)["kv_transfer_params"] == {"prompt_token_ids": [1, 9]}


def test_private_fields() -> None:
    assert without_private(PROMPT) == (PROMPT, False)
    assert without_private({**PROMPT, "kv_transfer_params": None, "ec_transfer_params": {}}) == (PROMPT, True)
    for extra in (None, 7, {}, {"mine": 1}):
        assert without_private({**PROMPT, "vllm_xargs": extra}) == ({**PROMPT, "vllm_xargs": extra}, False)
    extra = {"kv_transfer_params": "x", "ec_transfer_params": 1, "mine": 1}
    assert without_private({**PROMPT, "vllm_xargs": extra}) == ({**PROMPT, "vllm_xargs": {"mine": 1}}, True)
