"""The table of what decode can't continue from prefill's first token, one row each; and what it can."""

from __future__ import annotations

from typing import Any

import pytest
from engine_fakes import engine_info

from pdx.router.request.seedable import UNSEEDABLE_RULES, unseedable_reason
from pdx.router.request.servable import CHAT, COMPLETIONS

PROMPT: dict[str, Any] = {"model": "m", "prompt": "x"}
TALK: dict[str, Any] = {"model": "m", "messages": []}
ENGINE = engine_info("p0", "prefill", context_tokens=100)

UNSEEDABLE: list[tuple[str, str, dict[str, Any]]] = [
    ("endpoint", "/v1/messages", {"messages": []}),
    ("structured_output", COMPLETIONS, {"structured_outputs": {"regex": "a+"}}),
    ("structured_output", CHAT, {"response_format": {"type": "json_object"}}),
    ("structured_output", CHAT, {"response_format": "nonsense"}),
    ("structured_output", COMPLETIONS, {"guided_choice": ["a"]}),
    ("penalty", COMPLETIONS, {"presence_penalty": 0.5}),
    ("penalty", CHAT, {"frequency_penalty": -1}),
    ("penalty", CHAT, {"repetition_penalty": 1.1}),
    ("bad_words", COMPLETIONS, {"bad_words": ["very bad"]}),
    ("extension", CHAT, {"vllm_xargs": {"a": 1}}),
    ("extension", COMPLETIONS, {"logits_processors": ["module.Class"]}),
    ("seed", COMPLETIONS, {"seed": 0}),
    ("tools", CHAT, {"tools": [{}]}),
    ("tools", CHAT, {"tools": [{}], "tool_choice": "required"}),
    ("token_ids", CHAT, {"return_token_ids": True}),
    ("token_ids", COMPLETIONS, {"return_tokens_as_token_ids": True, "logprobs": 1}),
    ("budget", CHAT, {"thinking_token_budget": 0}),
    ("pattern", COMPLETIONS, {"repetition_detection": {"max_pattern_size": 4}}),
    ("pattern", COMPLETIONS, {"watermarking": True}),
    ("special_tokens", COMPLETIONS, {"skip_special_tokens": False, "spaces_between_special_tokens": False}),
    ("routed_experts", COMPLETIONS, {"routed_experts_prompt_start": 3}),
    (
        "stream_options",
        CHAT,
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    ("stream_options", COMPLETIONS, {"stream": True, "stream_options": "all"}),
    ("stream_options", COMPLETIONS, {"stream": True, "stream_options": {"include_usage": "sure"}}),
    ("stream_options", COMPLETIONS, {"stream": "true"}),
    ("stream_options", COMPLETIONS, {"stream": True, "stream_interval": 0}),
    ("min_tokens", COMPLETIONS, {"min_tokens": 17}),
    ("min_tokens", CHAT, {"min_tokens": 4, "max_tokens": 3}),
    ("min_tokens", CHAT, {"min_tokens": 1.5}),
    ("max_tokens", COMPLETIONS, {"max_tokens": 101}),
    ("max_tokens", CHAT, {"max_completion_tokens": 101}),
]

SEEDABLE: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {}),
    (CHAT, {}),
    (COMPLETIONS, {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "logit_bias": {"5": 3}}),
    (COMPLETIONS, {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "bad_words": []}),
    (CHAT, {"stop": ["a"], "stop_token_ids": [5], "ignore_eos": True, "min_tokens": 3, "logprobs": True}),
    (CHAT, {"tools": [{}], "tool_choice": "none", "response_format": {"type": "text"}, "seed": None}),
    (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": True}, "stream_interval": 4, "max_tokens": 100}),
    (COMPLETIONS, {"user": "u", "cache_salt": "s", "priority": 0, "unheard_of": 1, "watermarking": False}),
]


@pytest.mark.parametrize(("reason", "path", "body"), UNSEEDABLE)
def test_unseedable(reason: str, path: str, body: dict[str, Any]) -> None:
    assert unseedable_reason(path, (TALK if path == CHAT else PROMPT) | body, ENGINE) == reason


@pytest.mark.parametrize(("path", "body"), SEEDABLE)
def test_seedable(path: str, body: dict[str, Any]) -> None:
    assert unseedable_reason(path, (TALK if path == CHAT else PROMPT) | body, ENGINE) == ""


def test_a_reasoning_parser_splits_chat_answers_only() -> None:
    reasoning = engine_info("d0", "decode", reasoning_parser="deepseek_r1")
    assert unseedable_reason(CHAT, TALK, ENGINE, reasoning) == "reasoning"
    assert unseedable_reason(COMPLETIONS, PROMPT, ENGINE, reasoning) == ""


def test_what_a_model_brings_as_default() -> None:
    engine = engine_info("d0", "decode", sampling_defaults={"presence_penalty": 0.5, "repetition_penalty": 1.05})
    assert unseedable_reason(CHAT, TALK, engine) == "penalty"
    assert unseedable_reason(CHAT, {**TALK, "presence_penalty": 0}, engine) == ""
    engine = engine_info("d0", "decode", sampling_defaults={"max_tokens": 20.0})
    assert unseedable_reason(CHAT, TALK, engine) == "max_tokens"
    assert unseedable_reason(CHAT, {**TALK, "max_tokens": 21}, engine) == "max_tokens"
    assert unseedable_reason(CHAT, {**TALK, "max_tokens": 20}, engine) == ""


def test_every_rule_has_a_row() -> None:
    assert {rule.reason for rule in UNSEEDABLE_RULES} == {reason for reason, _, _ in UNSEEDABLE} | {"reasoning"}
