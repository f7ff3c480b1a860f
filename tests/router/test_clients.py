"""The openai and anthropic clients, unmodified, against the router: what they ask is served, what they get they read.

The engines are fakes with vLLM's shapes; tests/e2e asks real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from engine_fakes import Fleet, fleet, within
from model_engine import ModelEngine

from pdx.router.front.access import ApiKeys, Caller

openai = pytest.importorskip("openai", reason="the client is not installed: pip install 'pdx-kv[dev]'")
anthropic = pytest.importorskip("anthropic", reason="the client is not installed: pip install 'pdx-kv[dev]'")

KEY = "client-key-" + "x" * 20
CHAT = [{"role": "user", "content": "hello there"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


class SurfaceEngine(ModelEngine):
    """With the endpoints beside completions and chat, as vLLM 0.32 answers them."""

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("tools"):
            call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
            answer = self._whole(request.path, {**body, "messages": CHAT})
            answer["choices"][0] |= {"finish_reason": "tool_calls"}
            answer["choices"][0]["message"] |= {"content": None, "tool_calls": [call]}
            return web.json_response(answer)
        if isinstance(body.get("messages", [{}])[0].get("content"), list):
            body = {**body, "messages": CHAT}
        return await super()._answer(request, body)

    async def _other(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.requests.append({"path": request.path, **body})
        match request.path:
            case "/v1/embeddings":
                data = [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}]
                return web.json_response({"object": "list", "data": data, "model": "smol", "usage": {}})
            case "/v1/responses":
                return await self._events_of(request, body, self._response(), "response.completed")
            case "/v1/messages":
                return await self._messages(request, body)
            case "/v1/messages/count_tokens":
                return web.json_response({"input_tokens": 7})
            case "/tokenize":
                return web.json_response({"tokens": [1, 2, 3], "count": 3, "max_model_len": 64})
        return web.json_response({"prompt": "abc"})

    def _response(self) -> dict[str, Any]:
        text = {"type": "output_text", "text": f"by {self.engine_id}", "annotations": []}
        item = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
        return {"id": "resp_1", "object": "response", "created_at": 1, "model": "smol", "status": "completed",
                "output": [item], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}  # fmt: skip

    async def _messages(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prefill = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
        cached = 2 if self.role == "prefill" else 9
        usage = {"input_tokens": 10 - cached, "cache_read_input_tokens": cached, "output_tokens": 3}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "smol", "stop_reason": "end_turn",
                   "content": [{"type": "text", "text": f"by {self.engine_id}"}], "usage": usage}  # fmt: skip
        if prefill:
            return web.json_response({**message, "kv_transfer_params": {"pdx": {"handoff": "00", "pages": 1}}})
        if not body.get("stream"):
            return web.json_response(message)
        start = {**message, "content": [], "stop_reason": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
        text = {"type": "text_delta", "text": f'data: "cache_read_input_tokens" by {self.engine_id}'}
        return await self._send(request, [
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": text},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
            {"type": "message_stop"},
        ])  # fmt: skip

    async def _events_of(
        self, request: web.Request, body: dict[str, Any], response: dict[str, Any], kind: str
    ) -> web.StreamResponse:
        if not body.get("stream"):
            return web.json_response(response)
        delta = {"type": "response.output_text.delta", "delta": "by", "item_id": "m", "output_index": 0,
                 "content_index": 0, "sequence_number": 0, "logprobs": []}  # fmt: skip
        return await self._send(request, [delta, {"type": kind, "response": response, "sequence_number": 1}])

    async def _send(self, request: web.Request, events: list[dict[str, Any]]) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await reply.prepare(request)
        for event in events:
            await reply.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        await reply.write_eof()
        return reply


@asynccontextmanager
async def served(**changed: Any) -> AsyncIterator[tuple[Fleet, SurfaceEngine, SurfaceEngine]]:
    p, d = SurfaceEngine("p0", "prefill"), SurfaceEngine("d0", "decode")
    async with fleet(p, d, **{"journey": "auto", "keys": ApiKeys({KEY: Caller("client")}), **changed}) as router:
        yield router, p, d


@asynccontextmanager
async def by_openai(router: Fleet, key: str = KEY) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(base_url=router.published.http + "/v1", api_key=key, max_retries=0) as client:
        yield client


@asynccontextmanager
async def by_anthropic(router: Fleet, key: str = KEY) -> AsyncIterator[Any]:
    async with anthropic.AsyncAnthropic(base_url=router.published.http, api_key=key, max_retries=0) as client:
        yield client


@within(30)
async def test_openai_completions_and_chat() -> None:
    async with served() as (router, p, d), by_openai(router) as client:
        whole = await client.chat.completions.create(model="smol", messages=CHAT, max_tokens=6)
        pieces = [
            event
            async for event in await client.chat.completions.create(
                model="smol", messages=CHAT, max_tokens=6, stream=True, stream_options={"include_usage": True}
            )
        ]
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content
        assert pieces[-1].usage == whole.usage
        assert whole.usage.prompt_tokens_details.cached_tokens == 2, "prefill's number"
        reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
        assert reasons[-1] == whole.choices[0].finish_reason
        assert {"do_remote_decode", "do_remote_prefill"} == {
            key for engine in (p, d) for request in engine.requests for key in request["kv_transfer_params"]
        } & {"do_remote_decode", "do_remote_prefill"}  # fmt: skip
        raw = await client.completions.with_raw_response.create(model="smol", prompt="once", max_tokens=4, logprobs=1)
        answer = raw.parse()
        told = answer.choices[0].logprobs
        assert len(told.tokens) == len(told.token_logprobs) == answer.usage.completion_tokens
        assert raw.headers["x-pdx-way"] in ("seeded", "after")
        chat = await client.chat.completions.create(
            model="smol", messages=CHAT, max_tokens=3, logprobs=True, top_logprobs=2
        )
        assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens


@within(30)
async def test_openai_tools_grammars_and_images() -> None:
    async with served() as (router, p, d), by_openai(router) as client:
        create = client.chat.completions.with_raw_response.create
        raw = await create(model="smol", messages=CHAT, tools=[TOOL], tool_choice="auto")
        assert raw.parse().choices[0].message.tool_calls[0].function.name == "weather"
        assert (raw.headers["x-pdx-way"], raw.headers["x-pdx-unseeded"]) == ("paired", "tools")
        assert p.requests[-1]["tools"] == d.requests[-1]["tools"] == [TOOL]
        raw = await create(model="smol", messages=CHAT, response_format=SCHEMA, max_tokens=4)
        assert (raw.headers["x-pdx-way"], raw.headers["x-pdx-unseeded"]) == ("paired", "structured_output")
        assert d.requests[-1]["response_format"] == SCHEMA
        content = [{"type": "text", "text": "what is it?"}, IMAGE]
        raw = await create(model="smol", messages=[{"role": "user", "content": content}], max_tokens=4)
        assert (raw.headers["x-pdx-way"], raw.headers["x-pdx-reason"]) == ("alone", "multimodal")
        assert d.requests[-1]["messages"][0]["content"] == content
        assert raw.parse().choices[0].message.content


@within(30)
async def test_openai_everything_else() -> None:
    async with served() as (router, _, d), by_openai(router) as client:
        assert [model.id async for model in client.models.list()] == ["smol"]
        assert (await client.models.retrieve("smol")).root == "smol"
        embedding = await client.embeddings.create(model="smol", input="x", encoding_format="float")
        assert embedding.data[0].embedding == [0.25, 0.5]
        response = await client.responses.create(model="smol", input="hello", prompt_cache_key="chat-7")
        assert response.output_text == "by d0"
        assert d.requests[-1]["prompt_cache_key"] == "chat-7"
        stream = await client.responses.create(model="smol", input="hello", stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[-1] == "response.completed"


@within(30)
async def test_openai_errors() -> None:
    async with served() as (router, _, d):
        async with by_openai(router, key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with by_openai(router) as client:
            with pytest.raises(openai.NotFoundError, match="known here: smol"):
                await client.chat.completions.create(model="other", messages=CHAT)
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("other")
            for more in ({"previous_response_id": "resp_1"}, {"background": True}):
                with pytest.raises(openai.BadRequestError, match="not kept here"):
                    await client.responses.create(model="smol", input="x", **more)
            for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
                with pytest.raises(openai.NotFoundError):
                    await call("resp_1")
            d.fault = "break"
            with pytest.raises(openai.APIError, match="broke off"):
                stream = await client.completions.create(model="smol", prompt=[5, 6], max_tokens=6, stream=True, n=2)
                async for _ in stream:
                    pass


@within(30)
async def test_anthropic_messages_by_a_pair() -> None:
    async with served() as (router, p, d), by_anthropic(router) as client:
        ask = {"model": "smol", "max_tokens": 20, "messages": CHAT}
        raw = await client.messages.with_raw_response.create(**ask, system="be brief")
        message = await raw.parse()
        assert message.content[0].text == "by d0"
        assert message.usage.input_tokens + message.usage.cache_read_input_tokens == 10
        assert (raw.headers["x-pdx-way"], raw.headers["x-pdx-unseeded"]) == ("paired", "endpoint")
        asked, told = p.requests[0], d.requests[0]
        assert (asked["max_tokens"], asked["stream"], told["max_tokens"]) == (1, False, 20)
        assert asked["system"] == told["system"] == "be brief"
        assert (asked["kv_transfer_params"]["do_remote_decode"], told["kv_transfer_params"]["pdx_early"]) == (
            True,
            True,
        )
        async with client.messages.stream(**ask) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == 'data: "cache_read_input_tokens" by d0'
        assert final.usage.output_tokens == 3
        assert (await client.messages.count_tokens(model="smol", messages=CHAT)).input_tokens == 7


@within(30)
async def test_anthropic_what_no_pair_can_do_and_errors() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}, image]}
    async with served() as (router, p, _), by_anthropic(router) as client:
        for block in (image, result):
            raw = await client.messages.with_raw_response.create(
                model="smol", max_tokens=9, messages=[{"role": "user", "content": [block]}]
            )
            assert (raw.headers["x-pdx-way"], raw.headers["x-pdx-reason"]) == ("alone", "multimodal")
        assert not p.requests
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await client.messages.create(model="other", max_tokens=9, messages=CHAT)
        async with by_anthropic(router, key="wrong") as other:
            with pytest.raises(anthropic.AuthenticationError):
                await other.messages.create(model="smol", max_tokens=9, messages=CHAT)


@within(30)
async def test_tokenizing_goes_to_an_engine() -> None:
    async with served(keys=ApiKeys({})) as (router, _, _):
        _, answer, _ = await router.ask({"model": "smol", "prompt": "abc"}, path="/tokenize")
        assert answer["tokens"] == [1, 2, 3]
        _, answer, _ = await router.ask({"model": "smol", "tokens": [1]}, path="/detokenize")
        assert answer["prompt"] == "abc"
        replies = await asyncio.gather(
            *(router.ask({"model": "smol", "prompt": "x"}, path="/tokenize") for _ in range(9))
        )
        assert {status for status, _, _ in replies} == {200}
