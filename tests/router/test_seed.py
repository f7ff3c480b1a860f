"""Prefill's first token: when its text can be shown, and how decode's stream goes on from it."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdx.router.request.prefill_reply import PrefillReply
from pdx.router.request.seed import Continuation, Seed, own_answer, straddles
from pdx.router.request.usage import EventStream

USAGE = {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}
REPLY: dict[str, Any] = {
    "id": "cmpl-r", "object": "text_completion", "created": 100, "model": "m", "system_fingerprint": "f",
    "choices": [{
        "index": 0, "text": " Paris", "logprobs": None, "finish_reason": "length", "stop_reason": None,
        "token_ids": [7], "prompt_token_ids": [1, 2, 3],
    }],
    "usage": USAGE, "kv_transfer_params": {"x": 1},
}  # fmt: skip


def seed_of(**changed: Any) -> Seed:
    reply = PrefillReply.read(json.dumps(REPLY).encode())
    assert reply is not None
    assert reply.seed is not None
    return msgspec.structs.replace(reply.seed, **changed)


@pytest.mark.parametrize(
    ("changed", "stop", "reason"),
    [
        ({}, None, ""),
        ({}, "not here", ""),
        ({}, ["Paris", " Paris"], ""),  # they would have ended the answer at prefill
        ({}, "s is", "seed_stop"),
        ({}, ["x", " Paris!"], "seed_stop"),
        ({"text": ""}, None, "seed_text"),
        ({"text": "a\ufffd"}, None, "seed_text"),
        ({"finish_reason": "abort"}, None, "seed_finish"),
    ],
)
def test_usable(changed: dict[str, Any], stop: object, reason: str) -> None:
    assert seed_of(**changed).unusable(stop) == reason


@given(st.text("ab", min_size=1, max_size=4), st.text("ab", max_size=4), st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_that_begins_in_the_seed_and_ends_behind_it_is_seen(seed: str, rest: str, stop: str) -> None:
    found = (seed + rest).find(stop)
    while 0 <= found < len(seed):
        assert straddles(seed, stop) or found + len(stop) <= len(seed)
        found = (seed + rest).find(stop, found + 1)


def test_a_reply_without_one_token_is_no_seed() -> None:
    for ids in (None, [], [7, 8]):
        reply = PrefillReply.read(
            json.dumps({**REPLY, "choices": [{**REPLY["choices"][0], "token_ids": ids}]}).encode()
        )
        assert reply is not None
        assert reply.seed is None


def test_own_answer_lacks_what_the_client_did_not_ask_for() -> None:
    answer = json.loads(own_answer(json.dumps(REPLY).encode()))
    assert answer["kv_transfer_params"] is None
    assert answer["choices"][0] == {**REPLY["choices"][0], "token_ids": None, "prompt_token_ids": None}
    assert answer["usage"] == USAGE


def test_a_whole_answer_of_another_shape_is_not_merged() -> None:
    for body in (b"", b"[]", b"{", b'{"choices":[]}', b'{"choices":[{"text":"x"}],"usage":null}', b'{"choices":[{}]}'):
        assert seed_of().merged(body) is None


def test_any_cut_of_decodes_stream_gives_the_same() -> None:
    """One time of creation, the role once, offsets from the seed, usage of both; every other byte as it came."""
    text = '\\"created\\":200, \\"completion_tokens\\" é'

    def event(created: int, rest: str) -> str:
        return f'data: {{"id":"chatcmpl-r","created":{created},"choices":[{rest}}}'

    def counts(prompt: int, answer: int) -> str:
        return f'],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{answer},"total_tokens":9}}'

    role, word = '{"index":0,"delta":{"role":"assistant"}}]', f'{{"index":0,"delta":{{"content":"{text}"}}}}]'
    theirs = [": ping", event(200, role), event(200, word), event(200, counts(4, 5)), "data: [DONE]"]
    ours = [": ping", event(100, word), event(100, counts(3, 6)), "data: [DONE]"]
    stream = "".join(event + "\n\n" for event in theirs).encode()
    for number in range(200):
        chance = random.Random(number)
        places = sorted(chance.randrange(len(stream)) for _ in range(8))
        cut = EventStream(None, seed_of(role="assistant"))
        got = [cut.feed(stream[a:b]) for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
        assert (b"".join(got) + cut.finish()).decode() == "".join(event + "\n\n" for event in ours)


def test_what_went_into_the_cache_is_prefills_number_too() -> None:
    """Decode counts the seed into its prompt, and has computed that itself."""
    seed = seed_of(role="assistant", usage={"prompt_tokens_details": {"cached_tokens": 96, "created_cache_tokens": 0}})
    usage = {"prompt_tokens": 101, "completion_tokens": 1}
    for theirs, ours in (
        ({"cached_tokens": 0, "created_cache_tokens": 96}, {"cached_tokens": 96, "created_cache_tokens": 0}),
        ({"cached_tokens": 0}, {"cached_tokens": 96}),
    ):
        answer = {"choices": [{"message": {"content": ""}}], "usage": {**usage, "prompt_tokens_details": theirs}}
        merged = seed.merged(json.dumps(answer).encode())
        assert merged is not None
        shown = {"prompt_tokens": 100, "completion_tokens": 2, "prompt_tokens_details": ours}
        assert json.loads(merged)["usage"] == shown


def test_events_of_another_shape_pass() -> None:
    goes_on = Continuation(seed_of())
    for event in (
        b"data: 5\n\n", b"data: {\n\n", b'data: {"error":{"code":500}}\n\n', b"event: error\n\n", b"data: [DONE]\n\n",
        b'data: {"created":null,"choices":[]}\n\n', b'data: {"choices":[7],"usage":{"completion_tokens":1}}\n\n',
        b'data: {"choices":[],"usage":{"completion_tokens":"many"}}\n\n',
    ):  # fmt: skip
        assert goes_on.events(event) == event
