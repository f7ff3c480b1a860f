"""Seeded and paired answers over real sockets: what clients get is what one engine alone would have said."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from typing import Any

import msgspec
import pytest
from engine_fakes import CONTENT, Fleet, fleet, handle_of, until, verified, within
from model_engine import CONTEXT_TOKENS, CREATED, EOS, SPECIAL, ModelEngine

from pdx.wire import HandoffFailed, encode

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PLAIN = 6  # " Paris"
PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
TALK = {"model": "smol", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "ignore_eos": True}
SEEDED = {**PROMPT, "allowed_token_ids": [PLAIN, 10, 14]}
SEEDED_TALK = {**TALK, "allowed_token_ids": [PLAIN, 10, 14]}
UNSEEDABLE = {**SEEDED, "presence_penalty": 0.5}
BODIES = {COMPLETIONS: SEEDED, CHAT: SEEDED_TALK}


def pair() -> tuple[ModelEngine, ModelEngine]:
    return ModelEngine("p0", "prefill"), ModelEngine("d0", "decode")


def events_of(stream: bytes) -> list[Any]:
    """The data of every event, [DONE] as text."""
    assert stream.endswith(b"\n\n")
    data = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n")[:-1]]
    return [text.decode() if text == b"[DONE]" else json.loads(text) for text in data]


async def stream_of(router: Fleet, url: str, body: dict[str, Any]) -> tuple[bytes, Any]:
    headers = {"X-Request-Id": "same"}
    async with router.client.post(url, json={**body, "stream": True}, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.read(), reply.headers


def without_engine(value: Any) -> Any:
    """An answer or event without what depends on the engine that gives it."""
    if isinstance(value, dict):
        return {k: without_engine(v) for k, v in value.items() if k not in ("created", "cached_tokens")}
    return [without_engine(part) for part in value] if isinstance(value, list) else value


def told(events: list[Any]) -> dict[str, Any]:
    """All that a stream says, whatever its cuts."""
    chunks = [event for event in events if isinstance(event, dict)]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return {
        "text": "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices),
        "roles": [c["delta"]["role"] for c in choices if "role" in c.get("delta", {})],
        "ends": [(c["finish_reason"], c.get("stop_reason")) for c in choices if c["finish_reason"]],
        "logprobs": {key: [entry for part in logprobs for entry in part[key]] for part in logprobs for key in part},
        "usage": [without_engine(chunk["usage"]) for chunk in chunks if chunk.get("usage")],
        "heads": {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks},
        "done": events.count("[DONE]"),
    }


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@within(20)
async def test_seeded_stream(path: str) -> None:
    p, d = pair()
    body = {**BODIES[path], "stream_options": {"include_usage": True}}
    async with fleet(p, d, journey="auto") as router:
        stream, headers = await stream_of(router, router.published.http + path, body)
        asked = d.requests[0]
        alone, _ = await stream_of(router, d.url + path, body)
        assert headers["x-pdx-way"] == "seeded"
        assert "x-pdx-unseeded" not in headers
        assert [without_engine(e) for e in events_of(stream)] == [without_engine(e) for e in events_of(alone)]
        assert {event["created"] for event in events_of(stream)[:-1]} == {CREATED["prefill"]}
        assert events_of(stream)[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
        prompt_tokens = events_of(stream)[-2]["usage"]["prompt_tokens"]
        params = asked["kv_transfer_params"]
        ids = params["prompt_token_ids"] if path == CHAT else asked["prompt"]
        assert (params["pdx_tokens"], len(ids), asked["max_tokens"]) == (prompt_tokens, prompt_tokens + 1, 7)
        assert (params["do_remote_prefill"], "pdx_early" in params) == (True, False)
        assert await router.metric('pdx_router_journeys_total{way="seeded"}') == 1
        assert await router.metric('pdx_router_handoffs_total{outcome="ok"}') == 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@within(20)
async def test_the_first_token_does_not_wait_for_decode(path: str) -> None:
    p, d = pair()
    d.fault = "hang"
    async with fleet(p, d, journey="auto") as router:
        async with router.post(path, {**BODIES[path], "stream": True}) as reply:
            got = b""
            while got.count(b"\n\n") < 1 + (path == CHAT):
                got += await reply.content.readany()
            assert told(events_of(got))["text"] in (" Paris", "a", " the")
            assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert await router.metric('pdx_router_ttft_seconds_count{model="smol"}') == 1
            await until(lambda: bool(d.requests), "decode was asked")
        await until(lambda: d.dropped == 1, "decode's request dropped")
        await until(lambda: bool(router.daemons[0].cancels), "cancel")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "more", [{"max_tokens": 1}, {"max_tokens": 2}, {"logit_bias": {str(EOS): 100}, "ignore_eos": False}]
)
@within(20)
async def test_short_answers(path: str, more: dict[str, Any]) -> None:
    p, d = pair()
    body = {**BODIES[path], **more, "logprobs": 1}
    one_token = more.get("max_tokens") != 2
    async with fleet(p, d, journey="auto") as router:
        for options in ({}, {"stream_options": {"include_usage": True}}):
            stream, headers = await stream_of(router, router.published.http + path, {**body, **options})
            assert bool(d.requests) != one_token
            alone, _ = await stream_of(router, d.url + path, {**body, **options})
            assert headers["x-pdx-way"] == "seeded"
            assert [without_engine(e) for e in events_of(stream)] == [without_engine(e) for e in events_of(alone)]
            d.requests.clear()
        same = {"headers": {"X-Request-Id": "same"}}
        _, answer, _ = await router.ask(body, path=path, **same)
        async with router.client.post(d.url + path, json=body, **same) as reply:
            assert without_engine(answer) == without_engine(json.loads(await reply.read()))
        assert answer["created"] == CREATED["prefill"]
        if one_token:
            await until(lambda: len(router.daemons[0].cancels) == 3, "handoffs of no use ended")
            assert await router.metric('pdx_router_handoffs_total{outcome="not_needed"}') == 3


@pytest.mark.parametrize(
    ("more", "unseeded"),
    [
        ({"logit_bias": {str(SPECIAL): 100}}, "seed_text"),
        ({"logit_bias": {"4": 100}}, "seed_text"),
        ({"logit_bias": {"5": 100}}, "seed_text"),
        ({"logit_bias": {str(PLAIN): 100}, "stop": "is Par"}, "seed_stop"),
    ],
)
@within(20)
async def test_a_token_that_cannot_be_shown_comes_from_decode(more: dict[str, Any], unseeded: str) -> None:
    p, d = pair()
    async with fleet(p, d, journey="auto") as router:
        stream, headers = await stream_of(router, router.published.http + COMPLETIONS, {**PROMPT, **more})
        assert (headers["x-pdx-way"], headers["x-pdx-unseeded"]) == ("after", unseeded)
        assert set(d.requests[0]["kv_transfer_params"]) == {"do_remote_prefill", "pdx_handle"}
        alone, _ = await stream_of(router, d.url + COMPLETIONS, {**PROMPT, **more})
        assert told(events_of(stream)) == told(events_of(alone))
        assert await router.metric(f'pdx_router_unseeded_total{{reason="{unseeded}"}}') == 1


@within(20)
async def test_a_prompt_that_leaves_room_for_one_token() -> None:
    p, d = pair()
    body = {**SEEDED, "prompt": [PLAIN] * (CONTEXT_TOKENS - 1)}
    async with fleet(p, d, journey="auto") as router:
        status, answer, _ = await router.ask(body)
        assert (status, answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == (
            200,
            "length",
            1,
        )
        assert not d.requests


@within(20)
async def test_what_decode_refuses_is_refused_before_any_token() -> None:
    p, d = pair()
    async with fleet(p, d, journey="auto") as router:
        for more in ({"max_tokens": CONTEXT_TOKENS + 1}, {"min_tokens": 9}):
            status, answer, headers = await router.ask({**SEEDED, **more, "stream": True})
            assert (status, headers["x-pdx-way"]) == (400, "paired")
            assert "tokens" in answer["error"]["message"]


@pytest.mark.parametrize("tokens", [CONTEXT_TOKENS - 6, CONTEXT_TOKENS - 1])
@within(20)
async def test_more_tokens_than_the_prompt_leaves_room_for_are_refused_before_any(tokens: int) -> None:
    """How many that are is known when prefill has counted the prompt."""
    p, d = pair()
    body = {**SEEDED, "prompt": [PLAIN] * tokens, "max_tokens": 20, "stream": True}
    room = CONTEXT_TOKENS - tokens
    async with fleet(p, d, journey="auto") as router:
        status, answer, headers = await router.ask({**body, "min_tokens": room + 1})
        assert (status, headers["x-pdx-way"], headers["x-pdx-unseeded"]) == (400, "after", "min_tokens")
        assert "min_tokens" in answer["error"]["message"]
        _, headers = await stream_of(router, router.published.http + COMPLETIONS, {**body, "min_tokens": room})
        assert headers["x-pdx-way"] == "seeded"


def random_body(chance: random.Random) -> tuple[str, dict[str, Any]]:
    path = chance.choice((COMPLETIONS, CHAT))
    text = "".join(chance.choice("abc xyz") for _ in range(chance.randint(1, 20)))
    talk = {"messages": [{"role": "user", "content": text}]}
    body: dict[str, Any] = {"model": "smol", **({"prompt": text} if path == COMPLETIONS else talk)}
    choices: dict[str, tuple[Any, ...]] = {
        "max_tokens": (1, 2, 3, 10, None),
        "min_tokens": (0, 1, 2, 3),
        "ignore_eos": (False, True),
        "stop": ("#", "##", ["aris a", "b\n"], ["a"], "ab", [" the", "Paris"], None),
        "include_stop_str_in_output": (True,),
        "stop_token_ids": ([13], [14, 15]),
        "logprobs": (1, 2) if path == COMPLETIONS else (True,),
        "allowed_token_ids": ([6, 7, 9, 10], [2, 6], [4, 5, 10], [8, 9]),
    }
    for field, values in choices.items():
        if chance.random() < 0.45:
            body[field] = chance.choice(values)
    if path == CHAT and chance.random() < 0.3:
        body["max_completion_tokens"] = chance.choice((1, 2, 5))
    if chance.random() < 0.1:
        body["frequency_penalty"] = 1.0
    return path, body


@within(60)
async def test_any_answer_is_that_of_one_engine_alone() -> None:
    """Text, usage, finish and stop reasons, log-probs: as whole answers and as streams."""
    p, d = pair()
    chance, ways = random.Random(23), Counter[str]()
    async with fleet(p, d, journey="auto") as router:
        for number in range(250):
            path, body = random_body(chance)
            same = {"headers": {"X-Request-Id": "same"}}
            status, answer, _ = await router.ask(body, path=path, **same)
            async with router.client.post(d.url + path, json=body, **same) as reply:
                alone = json.loads(await reply.read())
                assert (status, without_engine(answer)) == (reply.status, without_engine(alone)), (number, body)
            if status != 200:
                continue
            body["stream_options"] = {"include_usage": True}
            stream, headers = await stream_of(router, router.published.http + path, body)
            single, _ = await stream_of(router, d.url + path, body)
            assert told(events_of(stream)) == told(events_of(single)), (number, body)
            if headers["x-pdx-way"] != "paired":  # there decode may be faster, since it got no KV at all
                assert events_of(stream)[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
            ways[headers.get("x-pdx-unseeded", headers["x-pdx-way"])] += 1
        assert set(ways) >= {"seeded", "seed_text", "seed_stop", "penalty"}
        assert ways["seeded"] > 100
        assert await router.metric('pdx_router_handoffs_total{outcome="not_needed"}') > 20


@pytest.mark.parametrize(
    ("fault", "stream"), [("500", False), ("500", True), ("reset", False), ("reset", True), ("part", True)]
)
@within(20)
async def test_decode_fails_after_the_seed(fault: str, stream: bool) -> None:
    """Another engine goes on from the same token, and computes the prompt itself."""
    p, d = pair()
    async with fleet(p, d, ModelEngine("d1", "decode"), journey="auto") as router:
        alone, _ = await stream_of(router, d.url + CHAT, SEEDED_TALK)
        d.requests.clear()
        d.fault = fault
        other = router.daemons[0].engines[2]
        for _ in range(2):  # round robin: one of them meets d0 first
            async with router.post(CHAT, {**SEEDED_TALK, "stream": stream}) as reply:
                assert reply.status == 200
                got = await reply.read()
            text = told(events_of(got))["text"] if stream else json.loads(got)["choices"][0]["message"]["content"]
            assert text == told(events_of(alone))["text"]
            if stream:
                assert told(events_of(got))["usage"] == []
                assert events_of(got)[-1] == "[DONE]"
        (again,) = (r for r in other.requests if "pdx_handle" not in r["kv_transfer_params"])
        (failed,) = d.requests
        assert again["kv_transfer_params"] == {"prompt_token_ids": failed["kv_transfer_params"]["prompt_token_ids"]}
        await until(lambda: len(router.daemons[0].cancels) == 1, "cancel")


@within(20)
async def test_decode_fails_after_the_seed_with_nobody_else() -> None:
    p, d = pair()
    stranger = ModelEngine("d9", "decode", content=msgspec.structs.replace(CONTENT, weights="other"))
    async with fleet(p, d, stranger, journey="auto") as router:
        d.fault = "500"
        async with router.post(COMPLETIONS, {**SEEDED, "stream": True}) as reply:
            events = (await reply.read()).split(b"\n\n")
        assert b'"text":' in events[0]
        assert events[1].startswith(b"event: error\ndata: ")
        assert json.loads(events[1].split(b"data: ")[1])["error"]["code"] == 502
        assert events[2:] == [b""]
        assert not stranger.requests  # other weights may mean other tokens
        status, _, _ = await router.ask(SEEDED)
        assert status == 502


@pytest.mark.parametrize("body", [UNSEEDABLE, {**UNSEEDABLE, "stream": True}])
@within(20)
async def test_paired(body: dict[str, Any]) -> None:
    p, d = pair()
    async with fleet(p, d, journey="auto") as router:
        if body.get("stream"):
            stream, headers = await stream_of(router, router.published.http + COMPLETIONS, body)
            alone, _ = await stream_of(router, d.url + COMPLETIONS, body)
            assert stream == alone
        else:
            _, _, headers = await router.ask(body)
        assert (headers["x-pdx-way"], headers["x-pdx-unseeded"], headers["x-pdx-prefill"]) == (
            "paired",
            "penalty",
            "p0",
        )
        params = d.requests[0]["kv_transfer_params"]
        handle = handle_of(p.requests[0])
        assert params == {"do_remote_prefill": True, "pdx_handle": handle, "pdx_early": True}
        assert d.requests[0]["prompt"] == UNSEEDABLE["prompt"]
        assert await router.metric("pdx_router_inflight") == 0


@within(20)
async def test_paired_decode_overtakes_prefill() -> None:
    """A short prompt is computed by decode itself before prefill has answered, which nobody waits for then."""
    p, d = pair()
    p.fault = "hang"
    async with fleet(p, d, journey="paired") as router:
        status, answer, headers = await router.ask(SEEDED)
        assert (status, headers["x-pdx-way"]) == (200, "paired")
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 2  # decode's own number
        await until(lambda: p.dropped == 1, "prefill's request dropped")
        await stream_of(router, router.published.http + COMPLETIONS, SEEDED)
        await until(lambda: p.dropped == 2, "prefill's request dropped")
        await until(lambda: len(router.daemons[0].cancels) == 2, "cancels")
        assert await router.metric('pdx_router_handoffs_total{outcome="not_needed"}') == 2


@pytest.mark.parametrize("fault", ["500", "400", "reset", "bad_reply"])
@within(20)
async def test_paired_prefill_fails(fault: str) -> None:
    p, d = pair()
    p.fault, d.fault = fault, "hang"
    async with fleet(p, d, journey="paired", request_timeout_s=1.0) as router:
        asked = asyncio.create_task(router.ask(SEEDED))
        await until(lambda: bool(router.daemons[0].cancels), "cancel")
        assert (d.dropped, len(d.requests)) == (0, 1)  # decode was told by its daemon and goes on
        status, _, headers = await asked
        assert (status, headers["x-pdx-reason"].startswith("prefill_")) == (504, True)


@within(20)
async def test_paired_handoff_breaks() -> None:
    p, d = pair()
    p.fault = d.fault = "hang"
    async with fleet(p, d, journey="paired", request_timeout_s=2.0) as router:
        asked = asyncio.create_task(router.ask(SEEDED))
        await until(lambda: bool(p.requests and d.requests), "both were asked")
        handoff_id = verified(p.requests[0], time.time()).handoff_id
        failed = HandoffFailed(handoff_id=handoff_id, attempt=0, reason="nothing landed for 15 s")
        await router.daemons[0].socket.send(encode(failed))
        await until(lambda: p.dropped == 1, "prefill's request dropped")
        assert d.dropped == 0
        asked.cancel()
        await until(lambda: d.dropped == 1, "decode's request dropped")


@within(20)
async def test_paired_decode_fails() -> None:
    p, d = pair()
    p.fault = "hang"
    d.fault = "500"
    async with fleet(p, d, journey="paired") as router:
        status, _, headers = await router.ask(SEEDED)
        assert (status, headers["x-pdx-way"]) == (502, "paired")
        await until(lambda: p.dropped == 1, "prefill's request dropped")
        await until(lambda: len(router.daemons[0].cancels) == 1, "cancel")
        d.fault = "400"
        status, answer, _ = await router.ask(SEEDED)
        assert (status, answer["error"]["message"]) == (400, "too long")
        await until(lambda: p.dropped == 2, "prefill's request dropped")


@pytest.mark.parametrize("journey", ["auto", "paired"])
@within(20)
async def test_client_leaves(journey: str) -> None:
    p, d = pair()
    d.fault = "hang"
    p.fault = "hang" if journey == "paired" else ""
    async with fleet(p, d, journey=journey) as router:
        asked = asyncio.create_task(router.ask({**SEEDED, "stream": True}))
        await until(lambda: bool(p.requests and d.requests), "both were asked")
        asked.cancel()
        await until(lambda: (p.dropped, d.dropped) == (int(journey == "paired"), 1), "requests dropped")
        await until(lambda: len(router.daemons[0].cancels) == 1, "cancel")
        assert await router.metric('pdx_router_handoffs_total{outcome="client_gone"}') == 1
        assert await router.metric("pdx_router_inflight") == 0


@pytest.mark.parametrize("journey", ["auto", "paired"])
@within(20)
async def test_deadline(journey: str) -> None:
    p, d = pair()
    d.fault = "hang"
    p.fault = "hang" if journey == "paired" else ""
    async with fleet(p, d, journey=journey, request_timeout_s=0.3) as router:
        status, answer, _ = await router.ask(SEEDED)
        assert (status, answer["error"]["code"]) == (504, 504)
        async with router.post(COMPLETIONS, {**SEEDED, "stream": True}) as reply:
            assert (reply.status, b'"code":504' in await reply.read()) == (504 if journey == "paired" else 200, True)
        await until(lambda: (p.dropped, d.dropped) == (2 * (journey == "paired"), 2), "requests dropped")


@within(20)
async def test_a_full_line_turns_away() -> None:
    p, d = pair()
    p.fault = "hang"
    async with fleet(p, d, journey="auto", max_waiting=2, queue_size=0) as router:
        asked = [asyncio.create_task(router.ask(SEEDED)) for _ in range(2)]
        await until(lambda: len(p.requests) == 2, "the line is full")
        status, answer, headers = await router.ask(SEEDED)
        assert (status, answer["error"]["type"], headers["Retry-After"]) == (429, "RateLimitError", "1")
        assert await router.metric('pdx_router_requests_total{code="429",model="smol"}') == 1
        status, _, _ = await router.ask({**SEEDED, "n": 2})  # decode's line is its own
        assert status == 200
        for task in asked:
            task.cancel()
        await until(lambda: p.dropped == 2, "requests dropped")
        p.fault = ""
        status, _, _ = await router.ask(SEEDED)
        assert status == 200
