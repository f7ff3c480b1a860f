"""Right bodies for what speaks JSON: requests of clients and operators, answers of engines."""

from __future__ import annotations

from typing import Any

from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.router.request.seed import Seed
from pdx.wire import EngineInfo

ENGINE = EngineInfo(
    engine_id="P", role="prefill", model="m", url="http://127.0.0.1:1", context_tokens=4096,
    content=ContentFingerprint(
        model="m", weights="w", weight_epoch="", dtype="bf16", block_tokens=16, hash_algorithm="sha"
    ),
    layout=LayoutFingerprint(
        engine="e", attention="a", layers=2, page_bytes=4096, block_tokens=16, packing="L", kv_groups=1, ranks=1,
        chunk_blocks=2,
    ),
)  # fmt: skip

REQUESTS: tuple[dict[str, Any], ...] = (
    {"model": "m", "prompt": "Once", "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
    {"model": "m", "prompt": [1, 2, 3], "n": 1, "stop": ["x", "yz"], "logprobs": 2, "min_tokens": 1, "seed": 7},
    {
        "model": "m", "max_completion_tokens": 9, "top_logprobs": 1, "temperature": 0.5, "tool_choice": "none",
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
        ],
    },
    {
        "model": "m", "max_tokens": 9, "system": "be brief", "cache_salt": "s",
        "messages": [{"content": [{"type": "tool_result", "content": [{"type": "text", "text": "a"}]}]}],
    },
    {
        "model": "m", "messages": [], "response_format": {"type": "text"}, "tools": [{}], "guided_json": {},
        "truncate_prompt_tokens": 5, "kv_transfer_params": {"pdx_handle": "x"}, "presence_penalty": 0,
    },
)  # fmt: skip

_USAGE = {
    "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 1, "created_cache_tokens": 3},
}  # fmt: skip
_HEAD = {"id": "1", "object": "o", "created": 9, "model": "m"}
ANSWERS: tuple[dict[str, Any], ...] = (
    {
        **_HEAD, "usage": _USAGE, "kv_transfer_params": {"pdx": True}, "prompt_token_ids": [1, 2],
        "choices": [{
            "index": 0, "token_ids": [3], "message": {"role": "assistant", "content": "a"}, "finish_reason": "length",
            "logprobs": {"content": [{"token": "a", "logprob": -1, "top_logprobs": []}]},
        }],
    },
    {
        **_HEAD, "usage": _USAGE,
        "choices": [{
            "index": 0, "text": "a", "prompt_token_ids": [1, 2], "token_ids": [3], "finish_reason": "length",
            "logprobs": {"tokens": ["a"], "token_logprobs": [-1], "text_offset": [0], "top_logprobs": [{"a": -1}]},
        }],
    },
    {**_HEAD, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}]},
    {**_HEAD, "choices": [], "usage": _USAGE},
)  # fmt: skip

SEED = Seed(
    id="1", created=8, model="m", fingerprint=None, role="", token_id=3, text="a",
    logprobs={"tokens": ["a"], "token_logprobs": [-1.0], "text_offset": [0], "top_logprobs": [{}]},
    finish_reason="length", stop_reason=None, usage=_USAGE,
)  # fmt: skip
CHAT_SEED = Seed(
    id="1", created=8, model="m", fingerprint="f", role="assistant", token_id=3, text="a",
    logprobs={"content": [{"token": "a"}]}, finish_reason="length", stop_reason=None, usage=_USAGE,
)  # fmt: skip

OPERATORS: tuple[dict[str, Any], ...] = (
    {"model": "m", "text": "The manual begins"},
    {"tokens": [1, 2, 3], "salt": "s", "name": "n", "ttl_s": 60},
    {"messages": [{"role": "user", "content": "hi"}], "tools": [], "tier": "disk"},
    {"name": "n"},
    {"all": True, "dry_run": True, "older_s": 5, "tenant": "t"},
)
