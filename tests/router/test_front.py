"""The router over real sockets: what clients get, what engines and daemons are told, whatever fails."""

from __future__ import annotations

import asyncio
import io
import json
import time

import aiohttp
import pytest
from engine_fakes import FakeEngine, fleet, handle_of, until, verified, within

from pdx.router.request.usage import EVENT_BYTES_MAX
from pdx.wire import HandoffFailed, encode

PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}
CHAT = {"model": "smol", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def pair() -> tuple[FakeEngine, FakeEngine]:
    return FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")


@within(20)
async def test_completion_by_a_pair() -> None:
    p, d = pair()
    async with fleet(p, d) as router:
        status, answer, headers = await router.ask(PROMPT, headers={"X-Request-Id": "mine-1"})
        assert status == 200
        assert answer["choices"][0]["text"] == "by d0"
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2  # prefill's number
        asked, told = p.requests[0], d.requests[0]
        assert (asked["max_tokens"], asked["stream"], asked["return_token_ids"]) == (1, False, True)
        assert asked["kv_transfer_params"]["do_remote_decode"] is True
        assert told["kv_transfer_params"] == {"do_remote_prefill": True, "pdx_handle": handle_of(asked)}
        assert told["prompt"] == [1, 2, 3, 4]
        assert told["max_tokens"] == 8
        handle = verified(asked, time.time())
        assert (handle.prefill_engine, handle.decode_engine) == ("p0", "d0")
        assert headers["x-pdx-handoff"] == handle.handoff_id.hex()
        assert (headers["x-pdx-prefill"], headers["x-pdx-decode"]) == ("p0", "d0")
        assert "x-pdx-reason" not in headers
        assert p.headers[0]["X-Request-Id"] == d.headers[0]["X-Request-Id"] == headers["X-Request-Id"] == "mine-1"
        assert await router.metric('pdx_router_handoffs_total{outcome="ok"}') == 1
        assert await router.metric('pdx_router_requests_total{code="200",model="smol"}') == 1
        assert await router.metric("pdx_router_inflight") == 0
        assert await router.metric('pdx_router_engines{role="prefill"}') == 1


@within(20)
async def test_each_request_goes_to_the_very_rank_that_its_handle_names() -> None:
    """Data-parallel ranks share a URL: without a word from us, their server chooses."""
    p, d = FakeEngine("p_dp1", "prefill", data_parallel_rank=1), FakeEngine("d0", "decode")
    async with fleet(p, d) as router:
        status, _, headers = await router.ask(PROMPT, headers={"X-data-parallel-rank": "7"})
        assert (status, headers["x-pdx-prefill"]) == (200, "p_dp1")
        assert p.headers[0]["X-data-parallel-rank"] == "1"
        assert "X-data-parallel-rank" not in d.headers[0], "it is alone behind its URL, and clients do not steer"


@within(20)
async def test_chat_by_a_pair() -> None:
    p, d = pair()
    async with fleet(p, d, hosts=2) as router:
        status, answer, _ = await router.ask(CHAT, path="/v1/chat/completions")
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "by d0")
        assert (p.requests[0]["max_tokens"], p.requests[0]["max_completion_tokens"]) == (1, 1)
        assert d.requests[0]["kv_transfer_params"]["prompt_token_ids"] == [1, 2, 3, 4]
        assert d.requests[0]["messages"] == CHAT["messages"]
        assert "prompt" not in d.requests[0]


@within(20)
async def test_a_long_prompt() -> None:
    p, d = pair()
    async with fleet(p, d) as router:
        body = {"model": "smol", "prompt": list(range(300_000)), "max_tokens": 1}  # 2 MB of JSON
        async with router.client.post(
            router.published.http + "/v1/completions", data=io.BytesIO(json.dumps(body).encode())
        ) as reply:
            assert reply.status == 200
        assert d.requests[0]["prompt"] == body["prompt"]


@within(20)
async def test_stream_passes_unchanged_but_for_the_usage() -> None:
    p, d = pair()
    async with fleet(p, d) as router:
        async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
            assert reply.headers["Content-Type"].startswith("text/event-stream")
            got = await reply.read()
        ours, theirs = got.split(b"\n\n"), d.streamed.split(b"\n\n")
        assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b] == [3]
        assert json.loads(ours[3][6:])["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
        assert json.loads(theirs[3][6:])["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
        assert await router.metric('pdx_router_ttft_seconds_count{model="smol"}') == 1
        assert await router.metric('pdx_router_handover_seconds_count{model="smol"}') == 1
        handover_s = await router.metric('pdx_router_handover_seconds_sum{model="smol"}')
        assert 0 < handover_s < await router.metric('pdx_router_e2e_seconds_sum{model="smol"}')


@within(20)
async def test_private_fields_are_stripped() -> None:
    p, d = pair()
    async with fleet(p, d) as router:
        forged = {"do_remote_prefill": True, "pdx_handle": "forged"}
        await router.ask({**PROMPT, "kv_transfer_params": forged})
        assert handle_of(p.requests[0]) != "forged"
        await router.ask({**PROMPT, "n": 2, "kv_transfer_params": forged})
        assert "kv_transfer_params" not in d.requests[-1]
        assert await router.metric("pdx_router_stripped_params_total") == 2


@within(20)
async def test_what_a_pair_cannot_serve_goes_alone() -> None:
    p, d = pair()
    async with fleet(p, d) as router:
        status, _, headers = await router.ask({**PROMPT, "n": 2})
        assert (status, headers["x-pdx-reason"], headers["x-pdx-handoff"]) == (200, "n", "none")
        status, answer, headers = await router.ask({"model": "smol", "input": "x"}, path="/v1/embeddings")
        assert (status, answer["by"], headers["x-pdx-reason"]) == (200, "d0", "endpoint")
        form = aiohttp.FormData({"model": "smol"})
        form.add_field("file", b"\x00\x01", filename="a.wav")
        async with router.client.post(router.published.http + "/v1/audio/transcriptions", data=form) as reply:
            assert reply.status == 200
        assert b"\x00\x01" in d.requests[-1]["raw"]
        status, answer, _ = await router.ask({"prompt": "x"}, path="/tokenize")
        assert answer["path"] == "/tokenize"
        assert not p.requests
        assert await router.metric('pdx_router_alone_total{reason="n"}') == 1


@pytest.mark.parametrize("fault", ["500", "reset", "bad_reply"])
@within(20)
async def test_prefill_fails(fault: str) -> None:
    p, d = pair()
    p.fault = fault
    async with fleet(p, d, hosts=2) as router:
        status, answer, headers = await router.ask(PROMPT)
        assert (status, answer["choices"][0]["text"]) == (200, "by d0")
        assert headers["x-pdx-handoff"] == "none"
        assert headers["x-pdx-reason"].startswith("prefill_")
        assert "kv_transfer_params" not in d.requests[0]
        assert d.requests[0]["prompt"] == PROMPT["prompt"]
        cancelled = verified(p.requests[0], time.time()).handoff_id
        for daemon in router.daemons:
            await until(lambda daemon=daemon: bool(daemon.cancels), "cancel")
            assert [cancel.handoff_id for cancel in daemon.cancels] == [cancelled]


@within(20)
async def test_prefill_times_out() -> None:
    p, d = pair()
    p.fault = "hang"
    async with fleet(p, d, prefill_timeout_s=0.2) as router:
        status, _, headers = await router.ask(PROMPT)
        assert (status, headers["x-pdx-reason"]) == (200, "prefill_timeout")
        await until(lambda: p.dropped == 1, "prefill's request dropped")


@within(20)
async def test_a_daemon_says_that_the_handoff_has_failed() -> None:
    """A stopped prefill engine answers nobody; its handoff's budget ends long before prefill's timeout."""
    p, d = pair()
    p.fault = "hang"
    async with fleet(p, d) as router:
        asked = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: bool(p.requests), "prefill was asked")
        handoff_id = verified(p.requests[0], time.time()).handoff_id
        for failed_id in (bytes(16), handoff_id, handoff_id):
            failed = HandoffFailed(handoff_id=failed_id, attempt=0, reason="nothing landed for 15 s")
            await router.daemons[0].socket.send(encode(failed))
        status, _, headers = await asked
        assert (status, headers["x-pdx-reason"]) == (200, "handoff_failed")
        await until(lambda: p.dropped == 1, "prefill's request dropped")


@within(20)
async def test_prefill_dies_under_a_request_and_stays_away() -> None:
    p, d = pair()
    p.fault = "hang"
    async with fleet(p, d) as router:
        asked = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: bool(p.requests), "prefill was asked")
        await p.stop()
        status, _, headers = await asked
        assert (status, headers["x-pdx-reason"]) == (200, "prefill_broken")
        status, _, headers = await router.ask(PROMPT)
        assert (status, headers["x-pdx-reason"]) == (200, "prefill_unreachable")
        status, _, headers = await router.ask(PROMPT)
        assert (status, headers["x-pdx-reason"]) == (200, "no_pair")  # nobody tries again before /health answers


@within(20)
async def test_client_error_of_prefill_reaches_the_client_unchanged() -> None:
    p, d = pair()
    p.fault = "400"
    async with fleet(p, d) as router:
        status, answer, _ = await router.ask(PROMPT)
        assert (status, answer) == (400, {"error": {"message": "too long", "code": 400}})
        assert not d.requests


@pytest.mark.parametrize("fault", ["500", "reset", "part"])
@within(20)
async def test_decode_fails_before_the_first_byte(fault: str) -> None:
    p, d = pair()
    other = FakeEngine("d1", "decode")
    async with fleet(p, d, other) as router:
        d.fault = other.fault = fault
        async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
            assert reply.status == 502
            assert (await reply.json())["error"]["code"] == 502
        assert {bool(e.requests) for e in (d, other)} == {True}  # one try each
        await until(lambda: bool(router.daemons[0].cancels), "cancel")
        first = next(e for e in (d, other) if "kv_transfer_params" in e.requests[0])
        second = other if first is d else d
        assert "kv_transfer_params" not in second.requests[0]
        d.fault = other.fault = ""
        first.fault = fault
        for _ in range(4):  # whichever is chosen first, the answer comes
            await router.seen(3)
            status, answer, _ = await router.ask(PROMPT)
            assert (status, answer["choices"][0]["text"]) == (200, f"by {second.engine_id}") or fault == "part"


@within(20)
async def test_decode_breaks_when_all_has_been_said() -> None:
    """The client has its [DONE]: nothing may come behind it."""
    p, d = pair()
    d.fault = "late"
    async with fleet(p, d) as router:
        async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
            said = await reply.read()
        assert said.endswith(b"data: [DONE]\n\n")
        assert b"event: error" not in said


@pytest.mark.parametrize("fault", ["break", "short"])
@within(20)
async def test_decode_breaks_after_the_first_byte(fault: str) -> None:
    p, d = pair()
    d.fault = fault
    async with fleet(p, d) as router:
        async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
            events = (await reply.read()).split(b"\n\n")
        assert events[0] in d.streamed
        assert events[1].startswith(b"event: error\ndata: ")
        assert json.loads(events[1].split(b"data: ")[1])["error"]["code"] == 502
        assert events[2:] == [b""]  # no [DONE], and nothing of the event that was cut


@pytest.mark.parametrize("padding", ["", "x" * EVENT_BYTES_MAX], ids=["the last of it", "more than is held"])
@within(20)
async def test_decode_ends_within_an_event(padding: str) -> None:
    """Where a part of it has been passed on, the error is an event of its own all the same."""
    p, d = pair()
    d.fault, d.padding = "cut", padding
    async with fleet(p, d) as router:
        async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
            said, _, error = (await reply.read()).rpartition(b"\n\nevent: error\ndata: ")
        assert said == d.streamed
        assert json.loads(error)["error"]["code"] == 502


@within(20)
async def test_deadline() -> None:
    p, d = pair()
    async with fleet(p, d, request_timeout_s=0.3) as router:
        d.fault = "hang"
        status, answer, _ = await router.ask(PROMPT)
        assert (status, answer["error"]["type"]) == (504, "GatewayTimeoutError")
        d.fault = "stall"
        async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
            assert (reply.status, b'"code":504' in await reply.read()) == (200, True)
        await until(lambda: d.dropped == 2, "decode's requests dropped")
        assert len(router.daemons[0].cancels) == 2


@pytest.mark.parametrize("where", ["prefill", "decode", "stream"])
@within(20)
async def test_client_leaves(where: str) -> None:
    p, d = pair()
    async with fleet(p, d) as router:
        engine = p if where == "prefill" else d
        engine.fault = "stall" if where == "stream" else "hang"
        asked = asyncio.create_task(router.ask({**PROMPT, "stream": True}))
        await until(lambda: bool(engine.requests) and (where != "stream" or bool(d.streamed)), "the engine was asked")
        asked.cancel()
        await until(lambda: engine.dropped == 1, "the engine's request dropped")
        await until(lambda: bool(router.daemons[0].cancels), "cancel")
        assert router.daemons[0].cancels[0].handoff_id == verified(p.requests[0], time.time()).handoff_id
        assert await router.metric("pdx_router_inflight") == 0
        assert await router.metric('pdx_router_handoffs_total{outcome="client_gone"}') == 1


@within(20)
async def test_a_body_that_stops_in_the_middle() -> None:
    async with fleet(*pair(), request_timeout_s=0.3) as router:
        host, port = router.published.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
        assert await router.metric("pdx_router_inflight") == 0


@within(20)
async def test_engines_join_and_leave() -> None:
    p, d = pair()
    async with fleet() as router:
        status, answer, headers = await router.ask(PROMPT)
        assert (status, headers["Retry-After"]) == (503, "1")
        async with router.get("/readyz") as reply:
            assert (reply.status, (await reply.json())["reasons"]) == (503, ["no engine has joined"])
        await p.start()
        await d.start()
        d.healthy = False
        try:
            daemon = router.daemons[0]
            daemon.engines = [p, d]
            await router.seen(1)  # announced, but d's /health does not answer yet
            status, answer, _ = await router.ask(PROMPT)
            assert (status, "no decode engine" in answer["error"]["message"]) == (503, True)
            d.healthy = True
            await router.seen(2)
            async with router.get("/v1/models") as reply:
                assert [model["id"] for model in (await reply.json())["data"]] == ["smol"]
            for query, status in (("", 200), ("?engines=2", 200), ("?engines=3", 503), ("?engines=x", 400)):
                async with router.get("/readyz" + query) as reply:
                    assert reply.status == status
            assert (await router.ask(PROMPT))[2]["x-pdx-prefill"] == "p0"
            daemon.engines = [d]
            await router.seen(1)
            assert (await router.ask(PROMPT))[2]["x-pdx-reason"] == "no_pair"
        finally:
            await p.stop()
            await d.stop()


@within(20)
async def test_bad_requests() -> None:
    p, d = pair()
    async with fleet(p, d) as router:
        status, answer, _ = await router.ask({**PROMPT, "model": "other"})
        assert (status, "smol" in answer["error"]["message"]) == (404, True)
        status, _, _ = await router.ask({**PROMPT, "model": 7})
        assert status == 400
        status, _, _ = await router.ask([1, 2])
        assert status == 400
        status, _, _ = await router.ask({"adapter": "x"}, path="/v1/load_lora_adapter")
        assert status == 403
        url = router.published.http + "/v1/completions"
        for raw in (b"{", b"", b'{"a":' * 5000, b"\xff"):
            async with router.client.post(url, data=raw) as reply:
                assert (reply.status, (await reply.json())["error"]["type"]) == (400, "BadRequestError")
        async with router.client.post(url, data=io.BytesIO(b" " * (33 << 20))) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (413, 413)
        async with router.client.post(url, data=b"{}", headers={"X-Long": "x" * 20_000}) as reply:
            assert reply.status == 400
        async with router.get("/nowhere") as reply:
            assert (reply.status, (await reply.json())["error"]["type"]) == (404, "NotFoundError")
        async with router.get("/health") as reply:
            assert reply.status == 200
        assert not p.requests
        assert not d.requests


@within(20)
async def test_concurrent_requests_spread_and_are_counted() -> None:
    engines = [FakeEngine(f"p{n}", "prefill") for n in range(2)] + [FakeEngine(f"d{n}", "decode") for n in range(2)]
    async with fleet(*engines, policy="least_loaded") as router:
        replies = await asyncio.gather(*(router.ask(PROMPT) for _ in range(40)))
        assert {status for status, _, _ in replies} == {200}
        assert all(len(engine.requests) >= 10 for engine in engines)
        assert len({headers["x-pdx-handoff"] for _, _, headers in replies}) == 40


@within(20)
async def test_an_engine_of_both_roles_works_alone() -> None:
    async with fleet(FakeEngine("b0", "both")) as router:
        status, _, headers = await router.ask(PROMPT)
        assert (status, headers["x-pdx-decode"], headers["x-pdx-reason"]) == (200, "b0", "no_pair")
