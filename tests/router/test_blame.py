"""Streams that stall: whose fault it is, at their deadline and while a breaker is half open."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import cast

import pytest
from engine_fakes import FakeEngine, fleet, until, within
from journeys import D0, D1, P0

from pdx.router.outside import Outside
from pdx.router.request import conductor
from pdx.router.request.actions import DecodeAnswered, Event, PrefillAnswered
from pdx.router.standing import blame as code
from pdx.router.standing.blame import PROBE_S, STALL_S, Blame
from pdx.router.standing.breaker import BreakerSettings
from pdx.router.standing.standing import Standing

STREAMED = {"model": "smol", "prompt": "x", "max_tokens": 8, "stream": True}
ONCE = BreakerSettings(failure_threshold=1, success_threshold=1, timeout_s=10.0)
FIRST = DecodeAnswered(200, b"data: 1\n\n", streaming=True)
DEADLINE_S = 600.0


def blamed(standing: Standing) -> Blame:
    return Blame(cast(Outside, SimpleNamespace(standing=standing)), "smol")


async def ended(event: Event) -> asyncio.Task[Event]:
    async def call() -> Event:
        return event

    task = asyncio.create_task(call())
    await asyncio.wait({task})
    return task


async def streams(standing: Standing) -> Blame:
    """One whose first event has come."""
    blame = blamed(standing)
    blame.call_began(D0)(await ended(FIRST))
    return blame


@within(10)
async def test_a_stream_that_stalls_until_its_deadline_is_the_engines_failure() -> None:
    for timeout_s, silent_s, state in (
        (DEADLINE_S, STALL_S, {"d0": "open"}),
        (DEADLINE_S, STALL_S - 1, {}),
        (10.0, 5.0, {"d0": "open"}),
        (10.0, 4.0, {}),
    ):
        standing = Standing(ONCE)
        blame = await streams(standing)
        blame.waits(100.0)
        blame.heard(200.0, says=True)  # it went on once
        blame.waits(200.0)
        blame.deadline_passed(timeout_s, 200.0 + silent_s)
        blame.stream_ended(None)
        assert standing.ejected() == state


@within(10)
async def test_comments_are_no_tokens_and_a_clients_time_is_not_the_engines() -> None:
    for client_s, state in ((0.0, {"d0": "open"}), (DEADLINE_S, {"d0": "open"})):
        standing = Standing(ONCE)
        blame = await streams(standing)
        now = 0.0
        for _ in range(4):  # half of what it takes between any two
            blame.waits(now)
            now += STALL_S / 2
            blame.heard(now, says=False)
            now += client_s
        blame.waits(now)
        blame.deadline_passed(DEADLINE_S, now)
        blame.stream_ended(None)
        assert standing.ejected() == state
    for says in (False, True):
        standing = Standing(ONCE)
        blame = await streams(standing)
        blame.waits(0.0)
        blame.heard(STALL_S - 1, says=says)
        blame.deadline_passed(DEADLINE_S, DEADLINE_S)  # while the client is to take it
        blame.stream_ended(None)
        assert not standing.ejected()


@within(10)
async def test_a_probe_is_no_good_for_its_first_step_alone() -> None:
    for goes_on, state in ((False, "open"), (True, None)):
        standing = Standing(ONCE)
        standing.call_ended("d0", standing.call_began("d0"), ok=False, now=0.0)
        assert standing.applied((D0,), ONCE.timeout_s) == (D0,)
        now = time.monotonic()
        blame = await streams(standing)
        blame.waits(now)
        blame.heard(now, says=True)  # a chat's first step makes two events
        assert standing.ejected() == {"d0": "half_open"}
        assert standing.applied((D0,), ONCE.timeout_s) == (), "one at a time"
        blame.waits(now)
        if goes_on:
            later = time.monotonic() + PROBE_S
            blame.heard(later, says=True)
        else:
            blame.deadline_passed(DEADLINE_S, now + STALL_S)
            blame.stream_ended(None)
        assert standing.ejected().get("d0") == state


@within(10)
async def test_what_may_be_the_clients_fault_is_an_engines_if_another_one_serves() -> None:
    served, refused, full = DecodeAnswered(200, b"{}"), DecodeAnswered(401, b""), DecodeAnswered(429, b"")
    told: list[tuple[list[Event], dict[str, str]]] = [
        ([refused, served], {"d0": "open"}),
        ([PrefillAnswered(404, b""), served], {"d0": "open"}),
        ([DecodeAnswered(302, b""), served], {"d0": "open"}),
        ([refused], {}),
        ([refused, refused], {}),
        ([DecodeAnswered(500, b""), refused], {}),
        ([full, served], {}),
        ([DecodeAnswered(500, b""), full], {"d0": "open"}),
    ]
    for events, ejected in told:
        standing = Standing(ONCE)
        blame = blamed(standing)
        for engine, event in zip((D0, D1, P0), events, strict=False):
            blame.call_began(engine)(await ended(event))
        blame.request_ended("none")
        assert standing.ejected() == ejected, events


@within(20)
async def test_an_engine_that_stalls_after_its_first_event_is_ejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "STALL_S", 0.0)
    engine = FakeEngine("d0", "decode")
    engine.fault = "stall"
    async with fleet(engine, breaker=BreakerSettings(failure_threshold=2), request_timeout_s=1.0) as router:
        for _ in range(2):
            async with router.post("/v1/completions", STREAMED) as reply:
                assert b'"code":504' in await reply.read()
        assert router.outside.standing.ejected() == {"d0": "open"}


@within(30)
async def test_a_client_that_reads_nothing_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "STALL_S", 0.0)
    monkeypatch.setattr(conductor, "CLOSE_S", 0.1)
    engine = FakeEngine("d0", "decode")
    engine.fault = "endless"
    async with fleet(engine, breaker=ONCE, request_timeout_s=3.0) as router:
        async with router.post("/v1/completions", STREAMED) as reply:
            assert reply.status == 200
            await until(lambda: any(each._paused for each in router.outside.upstream._open), "no more is read")
            await until(lambda: router.outside.under_way == 0, "its deadline has passed")
        assert not router.outside.standing.ejected()
        engine.fault = ""


@within(20)
async def test_a_probe_is_over_while_its_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was to find out is known; its stream may last for minutes."""
    monkeypatch.setattr(code, "PROBE_S", 0.0)
    engine = FakeEngine("d0", "decode")
    engine.fault = "500"
    patient = BreakerSettings(failure_threshold=1, success_threshold=2, timeout_s=0.2)
    async with AsyncExitStack() as going_on, fleet(engine, breaker=patient) as router:
        await router.ask(STREAMED)
        engine.fault = "endless"
        under_way = 0
        async with asyncio.timeout(10):
            while under_way < 2:
                reply = await going_on.enter_async_context(router.post("/v1/completions", STREAMED))
                under_way += reply.status == 200  # before it is half open, and while one is on trial: 503
                await asyncio.sleep(0.02)
        await until(lambda: not router.outside.standing.ejected(), "closed, while both go on")
        engine.fault = ""
        await going_on.aclose()
