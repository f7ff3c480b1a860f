"""Back-pressure and failures over real sockets: who waits, who is turned away, who is ejected, what is repeated."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest
from aiohttp import web
from engine_fakes import CONTENT, FakeEngine, Fleet, fleet, until, verified, within

from pdx.router.choice import prompts
from pdx.router.service import drain
from pdx.router.standing.breaker import BreakerSettings
from pdx.wire import ONE_REQUEST, HandoffFailed, Role, encode

PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}
HASTY = BreakerSettings(failure_threshold=2, success_threshold=1, timeout_s=0.2)


def pair() -> tuple[FakeEngine, FakeEngine]:
    return FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")


def later(router: Fleet) -> None:
    """As if what has failed until now had not done so at this moment."""
    standing = router.outside.standing
    for breaker in (*standing._engines.values(), *standing._pairs.values()):
        breaker._failed_at -= 10


async def waiting(router: Fleet, count: int) -> None:
    await until(lambda: len(router.outside.gate.queue) == count, f"{count} wait")


@within(20)
async def test_requests_wait_while_engines_are_full_and_go_on_when_they_are_not() -> None:
    p, d = pair()
    d.fault = "hang"
    async with fleet(p, d, max_in_flight_decode=2, max_in_flight_prefill=1) as router:
        asked = [asyncio.create_task(router.ask(PROMPT)) for _ in range(6)]
        await until(lambda: len(d.requests) == 2, "decode is full")
        await waiting(router, 4)
        d.fault = ""
        for task in asked[:2]:
            task.cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [answer[0] for answer in answers if not isinstance(answer, BaseException)] == [200] * 4
        assert len(router.outside.gate.queue) == 0
        assert await router.metric("pdx_router_queue_seconds_count") == 5
        router.outside.gate.queue.check_integrity()


@within(20)
async def test_a_full_queue_and_one_that_does_not_move() -> None:
    p, d = pair()
    d.fault = "hang"
    async with fleet(p, d, max_in_flight_decode=1, queue_size=1, queue_timeout_s=5.0) as router:
        first = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: len(d.requests) == 1, "decode is full")
        second = asyncio.create_task(router.ask(PROMPT, headers={"x-pdx-ttl-secs": "0.2"}))
        await waiting(router, 1)
        status, answer, headers = await router.ask(PROMPT)
        assert (status, answer["error"]["type"]) == (429, "RateLimitError")
        assert int(headers["Retry-After"]) >= 1
        status, answer, headers = await second
        assert (status, answer["error"]["code"], headers["x-pdx-reason"]) == (504, 504, "queue_timeout")
        for reason in ("queue_full", "queue_timeout"):
            assert await router.metric(f'pdx_router_refused_total{{reason="{reason}"}}') == 1
        assert await router.metric('pdx_router_ttft_seconds_count{model="smol"}') == 0, "a refusal is no first byte"
        status, answer, _ = await router.ask(PROMPT, headers={"x-pdx-priority": "high"})
        assert (status, "x-pdx-priority" in answer["error"]["message"]) == (400, True)
        first.cancel()
        await until(lambda: router.outside.under_way == 0, "the client's leaving is noticed")
        assert not router.outside.in_flight
        assert not router.outside.in_line


@within(20)
async def test_the_urgent_go_first_and_tenants_take_turns() -> None:
    p, d = pair()
    d.fault = "hang"
    async with fleet(p, d, max_in_flight_decode=1) as router:
        blocker = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: len(d.requests) == 1, "decode is full")
        tasks = []
        asks = [("a1", "a", 0), ("a2", "a", 0), ("b1", "b", 0), ("urgent", "a", -1)]
        for place, (name, tenant, priority) in enumerate(asks):
            headers = {"Authorization": tenant, "x-pdx-priority": str(priority), "X-Request-Id": name}
            tasks.append(asyncio.create_task(router.ask(PROMPT, headers=headers)))
            await waiting(router, place + 1)
        d.fault = ""
        blocker.cancel()
        assert [answer[0] for answer in await asyncio.gather(*tasks)] == [200] * 4
        assert [headers["X-Request-Id"] for headers in d.headers[1:]] == ["urgent", "a1", "b1", "a2"]


class SilentTokenizer(FakeEngine):
    """It never says of which tokens a text is made."""

    waiting = 0

    async def _other(self, request: web.Request) -> web.Response:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
            raise AssertionError
        finally:
            self.waiting -= 1


@within(20)
async def test_who_waits_for_tokens_may_leave_or_run_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted once, and nothing of it is left, neither here nor at the engine."""
    monkeypatch.setattr(prompts, "PATIENCE_MIN_S", 60.0)
    monkeypatch.setattr(prompts, "PATIENCE_MAX_S", 60.0)
    engines = [SilentTokenizer("p0", "prefill"), SilentTokenizer("p1", "prefill"), FakeEngine("d0", "decode")]

    def waiting() -> int:
        return sum(engine.waiting for engine in engines if isinstance(engine, SilentTokenizer))

    async with fleet(*engines, policy="prefix", request_timeout_s=1.0) as router:
        asked = asyncio.create_task(router.ask({**PROMPT, "prompt": "a text " * 100}))
        await until(lambda: waiting() == 1, "an engine is asked for tokens")
        asked.cancel()
        await router.reaches('pdx_router_requests_total{code="499",model="smol"}', 1)
        await until(lambda: waiting() == 0, "the question is given up")
        status, _, _ = await router.ask({**PROMPT, "prompt": "another text " * 100})
        assert status == 504
        await until(lambda: waiting() == 0, "the question is given up")
        assert await router.metric('pdx_router_requests_total{code="504",model="smol"}') == 1
        assert await router.metric("pdx_router_inflight") == 0
        assert not any(engine.requests for engine in engines)


@within(20)
async def test_a_client_that_leaves_the_line_is_gone_from_it() -> None:
    p, d = pair()
    d.fault = "hang"
    async with fleet(p, d, max_in_flight_decode=1) as router:
        first = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: len(d.requests) == 1, "decode is full")
        second = asyncio.create_task(router.ask(PROMPT))
        await waiting(router, 1)
        second.cancel()
        await waiting(router, 0)
        first.cancel()
        await until(lambda: router.outside.under_way == 0, "all have left")
        assert len(p.requests) == 1


@within(20)
async def test_a_request_is_repeated_until_an_engine_answers() -> None:
    bad = [FakeEngine(f"d{n}", "decode") for n in range(2)]
    good = FakeEngine("d2", "decode")
    for engine, fault in zip(bad, ("500", "reset"), strict=True):
        engine.fault = fault
    async with fleet(*bad, good, retries=2) as router:
        for _ in range(3):
            status, answer, _ = await router.ask(PROMPT)
            assert (status, answer["choices"][0]["text"]) == (200, "by d2")
        assert await router.metric("pdx_router_retries_total") >= 2
        good.fault = "500"
        status, answer, _ = await router.ask(PROMPT)
        assert (status, answer["error"]["code"]) == (502, 502)


@within(20)
async def test_an_engine_that_keeps_failing_is_not_asked_and_then_once() -> None:
    bad, good = FakeEngine("d0", "decode"), FakeEngine("d1", "decode")
    bad.fault = "500"
    async with fleet(bad, good, breaker=HASTY) as router:
        answers = [await router.ask(PROMPT) for _ in range(8)]
        assert {answer[0] for answer in answers} == {200}
        assert len(bad.requests) == 2
        bad.fault = ""
        async with asyncio.timeout(10):
            while len(bad.requests) < 4:  # the probe, and then its share
                assert (await router.ask(PROMPT))[0] == 200


@within(20)
async def test_an_engine_that_is_full_is_asked_again() -> None:
    """503 is what vLLM says when its own queue is full: nothing is wrong with it."""
    full, good = FakeEngine("d0", "decode"), FakeEngine("d1", "decode")
    full.fault = "503"
    async with fleet(full, good, breaker=HASTY) as router:
        assert {(await router.ask(PROMPT))[0] for _ in range(8)} == {200}
        assert len(full.requests) == 4


@within(20)
@pytest.mark.parametrize("fault", ["500", "error"])
@pytest.mark.parametrize("engines", [[("d0", "decode"), ("d1", "decode")], [("p0", "prefill"), ("d0", "decode")]])
async def test_a_request_that_no_engine_can_serve_says_nothing_about_engines(
    engines: list[tuple[str, Role]], fault: str
) -> None:
    failing = [FakeEngine(engine_id, role) for engine_id, role in engines]
    async with fleet(*failing, breaker=HASTY, journey="paired") as router:
        for engine in failing:
            engine.fault = "500" if engine.role == "prefill" else fault
        for _ in range(6):
            async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
                assert reply.status == 502
        assert sum(len(engine.requests) for engine in failing) == 12, "each is asked each time"
        assert not router.outside.standing.ejected()


@within(20)
async def test_what_only_one_engine_was_asked_is_one_failure_at_one_moment() -> None:
    """One client may send as many as it likes."""
    engine = FakeEngine("d0", "decode")
    engine.fault = "500"
    async with fleet(engine, breaker=HASTY) as router:
        assert {(await router.ask(PROMPT))[0] for _ in range(6)} == {502}
        assert not router.outside.standing.ejected()
        later(router)
        assert [(await router.ask(PROMPT))[0] for _ in range(2)] == [502, 503]


@within(20)
async def test_what_no_engine_can_do_is_the_clients_answer_and_nobodys_failure() -> None:
    engines = [FakeEngine(f"d{n}", "decode") for n in range(2)]
    for engine in engines:
        engine.fault = "501"
    async with fleet(*engines, breaker=HASTY) as router:
        assert {(await router.ask(PROMPT))[0] for _ in range(6)} == {501}
        assert sum(len(engine.requests) for engine in engines) == 6, "none is repeated"
        assert not router.outside.standing.ejected()


@within(20)
async def test_an_engine_that_fails_in_its_stream_has_not_answered() -> None:
    """vLLM says so under a 200, and then [DONE]."""
    bad, good = FakeEngine("d0", "decode"), FakeEngine("d1", "decode")
    bad.fault = "error"
    async with fleet(bad, good, breaker=BreakerSettings(failure_threshold=2, timeout_s=60.0)) as router:
        for _ in range(10):
            async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
                heard = await reply.read()
            assert (b"d1 0" in heard, b"error" in heard, heard.endswith(b"data: [DONE]\n\n")) == (True, False, True)
        assert len(bad.requests) == 2, "its breaker is open"


@within(20)
async def test_what_the_client_has_done_wrong_is_its_answer_even_if_a_stream_says_it() -> None:
    """vLLM looks at some fields when the stream has begun, and then says 400 in it."""
    engines = [FakeEngine(f"d{n}", "decode") for n in range(2)]
    for engine in engines:
        engine.fault, engine.fault_code = "error", 400
    async with fleet(*engines, breaker=HASTY) as router:
        for _ in range(6):
            status, answer, _ = await router.ask({**PROMPT, "stream": True})
            assert (status, answer["error"]["code"]) == (400, 400)
        assert sum(len(engine.requests) for engine in engines) == 6
        assert not router.outside.standing.ejected()


@within(20)
async def test_a_stream_that_fails_later_ends_with_the_error_and_nothing_else() -> None:
    engine = FakeEngine("d0", "decode")
    engine.fault = "late_error"
    async with fleet(engine, breaker=HASTY) as router:
        for _ in range(2):
            async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
                heard = await reply.read()
            events = heard.split(b"\n\n")
            assert b"d0 0" in events[0]
            assert b'"error"' in events[1]
            assert b"[DONE]" not in heard
        assert router.outside.standing.ejected() == {"d0": "open"}


@within(20)
async def test_all_engines_are_ejected() -> None:
    engine = FakeEngine("d0", "decode")
    engine.fault = "500"
    async with fleet(engine, breaker=BreakerSettings(failure_threshold=2, timeout_s=30.0)) as router:
        for expected in (502, 502, 503):
            status, _, headers = await router.ask(PROMPT)
            assert status == expected
            later(router)
        assert 28 <= int(headers["Retry-After"]) <= 30
        async with router.get("/readyz") as reply:
            page = await reply.json()
        assert reply.status == 503
        assert "engine d0 keeps failing: its breaker is open" in page["reasons"]


@within(20)
async def test_an_engine_that_breaks_its_streams_is_ejected_too() -> None:
    engine = FakeEngine("d0", "decode")
    engine.fault = "break"
    async with fleet(engine, breaker=HASTY) as router:
        for _ in range(2):
            async with router.post("/v1/completions", {**PROMPT, "stream": True}) as reply:
                assert b"event: error" in await reply.read()
        assert (await router.ask(PROMPT))[0] == 503


@within(20)
async def test_an_engine_that_says_nothing_is_ejected_too() -> None:
    engine = FakeEngine("d0", "decode")
    engine.fault = "hang"
    async with fleet(engine, breaker=BreakerSettings(failure_threshold=2), request_timeout_s=0.1) as router:
        assert [(await router.ask(PROMPT))[0] for _ in range(3)] == [504, 504, 503]


async def handoffs_fail(router: Fleet, p: FakeEngine, reason: str) -> None:
    for _ in range(3):
        known = len(p.requests)
        asked = asyncio.create_task(router.ask(PROMPT))
        await until(lambda known=known: len(p.requests) > known, "prefill was asked")
        handoff_id = verified(p.requests[-1], time.time()).handoff_id
        await router.daemons[0].socket.send(encode(HandoffFailed(handoff_id=handoff_id, attempt=0, reason=reason)))
        status, _, headers = await asked
        assert (status, headers["x-pdx-reason"]) == (200, "handoff_failed")
        later(router)


@within(20)
async def test_daemons_that_can_not_hand_over_are_not_paired() -> None:
    p, d = pair()
    p.fault = "hang"
    async with fleet(p, d, hosts=2) as router:
        await handoffs_fail(router, p, "lane broke")
        status, _, headers = await router.ask(PROMPT)
        assert (status, headers["x-pdx-reason"]) == (200, "no_pair")
        async with router.get("/readyz") as reply:
            assert "handoffs from daemon d0 to d1 keep failing" in (await reply.json())["reasons"]


@within(20)
async def test_what_concerns_one_request_says_nothing_about_its_daemons() -> None:
    p, d = pair()
    p.fault = "hang"
    async with fleet(p, d, hosts=2) as router:
        await handoffs_fail(router, p, f"refused by decode: {ONE_REQUEST}this tenant's leases take its quota")
        assert not router.outside.standing.broken_pairs()


class Unsent(FakeEngine):
    """It computes, and hands nothing over."""

    def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return {**super()._whole(path, body), "kv_transfer_params": None}


@within(20)
async def test_what_prefill_does_not_send_of_an_adapter_says_nothing_about_its_daemons() -> None:
    adapters = {"lora": "aa"}
    p, d = Unsent("p0", "prefill", adapters=adapters), FakeEngine("d0", "decode", adapters=adapters)
    async with fleet(p, d) as router:
        for model, broken in (("lora", []), ("smol", [("d0", "d0")])):
            for _ in range(3):
                assert (await router.ask({**PROMPT, "model": model}))[0] == 200
                later(router)
            assert router.outside.standing.broken_pairs() == broken


@within(20)
async def test_a_draining_router_ends_what_it_has_and_takes_no_more() -> None:
    p, d = pair()
    d.fault = "stall"
    async with fleet(p, d, max_in_flight_decode=1) as router:
        async with router.post("/v1/completions", {**PROMPT, "stream": True}) as stream:
            assert await stream.content.readuntil(b"\n\n")
            waits = asyncio.create_task(router.ask(PROMPT))
            await waiting(router, 1)
            draining = asyncio.create_task(drain(router.outside, 10.0))
            status, _, headers = await waits
            assert (status, headers["Retry-After"]) == (503, "1")
            status, _, headers = await router.ask(PROMPT)
            assert (status, headers["Retry-After"]) == (503, "1")
            async with router.get("/readyz") as reply:
                assert (reply.status, (await reply.json())["reasons"]) == (503, ["this router is draining"])
            assert not draining.done()
        await draining  # its last client has left
        assert router.outside.under_way == 0


@within(20)
async def test_draining_has_an_end() -> None:
    p, d = pair()
    d.fault = "hang"
    async with fleet(p, d) as router:
        asked = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: len(d.requests) == 1, "decode was asked")
        await drain(router.outside, 0.05)
        assert router.outside.under_way == 1
        asked.cancel()


@within(20)
async def test_one_pool_is_upgraded_while_the_other_runs() -> None:
    """Engines of other weights are never paired, whatever leaves first and whatever joins."""
    new = {"content": msgspec.structs.replace(CONTENT, weights="new")}
    p_old, d_old = pair()
    p_new, d_new = FakeEngine("p1", "prefill", **new), FakeEngine("d1", "decode", **new)
    async with fleet(p_old, d_old, p_new, d_new) as router:
        daemon = router.daemons[0]

        async def pairs(*engines: FakeEngine) -> set[tuple[str, str]]:
            daemon.engines = list(engines)
            await router.seen(len(engines))
            told = [(await router.ask(PROMPT))[2] for _ in range(6)]
            return {(headers.get("x-pdx-prefill", ""), headers["x-pdx-decode"]) for headers in told}

        assert await pairs(p_old, d_old, p_new) == {("p0", "d0")}
        assert await pairs(d_old, p_new) == {("", "d0")}
        assert await pairs(d_old, p_new, d_new) == {("p1", "d1")}
        assert await pairs(p_old, d_old, p_new, d_new) == {("p0", "d0"), ("p1", "d1")}
