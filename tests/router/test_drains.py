"""Taking engines and routers out of service: what runs ends, what comes goes elsewhere."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from engine_fakes import KEY, FakeDaemon, FakeEngine, Fleet, daemon_ref, fleet, until, within

from pdx.commands import drain

PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}
STREAM = {**PROMPT, "stream": True}
JSON = {"Content-Type": "application/json"}


class SlowEngine(FakeEngine):
    """Answers when it may."""

    def __init__(self, engine_id: str) -> None:
        super().__init__(engine_id, "decode")
        self.may = asyncio.Event()

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await self.may.wait()
        return await super()._answer(request, body)


async def told(router: Fleet, verb: str, body: object = None) -> tuple[int, Any]:
    url = f"{router.published.admin}/admin/{verb}"
    method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
    async with router.client.request(method, url, data=data, headers=JSON) as reply:
        return reply.status, json.loads(await reply.read())


@within(20)
async def test_a_drained_engine_ends_what_it_has_and_gets_nothing_new() -> None:
    slow, other = SlowEngine("d0"), FakeEngine("d1", "decode")
    async with fleet(slow, other, admin_port=0, policy="round_robin") as router:
        asked = [asyncio.create_task(router.ask(PROMPT)) for _ in range(2)]
        await until(lambda: len(slow.requests) == 1, "the slow one has one of two")
        status, report = await told(router, "drain", {"engine_id": "d0"})
        assert (status, report["engines"]) == (200, [{"engine_id": "d0", "in_flight": 1}])
        for _ in range(4):
            assert (await router.ask(PROMPT))[1]["choices"][0]["text"] == "by d1"
        async with router.get("/readyz") as reply:
            assert "engine d0 is drained" in (await reply.json())["reasons"]
        slow.may.set()
        assert {(await task)[0] for task in asked} == {200}
        assert (await told(router, "drain"))[1] == {
            "router": False,
            "under_way": 0,
            "engines": [{"engine_id": "d0", "in_flight": 0}],
        }
        assert (await told(router, "undrain", {"engine_id": "d0"}))[1]["engines"] == []
        texts = {(await router.ask(PROMPT))[1]["choices"][0]["text"] for _ in range(2)}
        assert texts == {"by d0", "by d1"}


@within(20)
async def test_what_can_not_be_drained() -> None:
    async with fleet(FakeEngine("d0", "decode"), admin_port=0) as router:
        for verb, body in (("drain", {"engine_id": "d7"}), ("undrain", {"engine_id": "d0"}), ("drain", {"x": 1})):
            status, answer = await told(router, verb, body)
            assert (status, answer["error"]["code"]) == (400, 400)
        assert (await told(router, "drain", {}))[1]["router"] is True
        assert (await router.ask(PROMPT))[0] == 503
        assert (await told(router, "undrain", {}))[1]["router"] is False
        assert (await router.ask(PROMPT))[0] == 200


@within(20)
async def test_one_of_several_workers_promises_nothing_for_the_others() -> None:
    async with fleet(FakeEngine("d0", "decode"), admin_port=0, workers=2) as router:
        status, answer = await told(router, "drain", {"engine_id": "d0"})
        assert (status, "workers" in answer["error"]["message"]) == (400, True)
        assert (await router.ask(PROMPT))[0] == 200


@within(20)
async def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    slow = SlowEngine("d0")
    async with fleet(slow, admin_port=0) as router:

        async def command(*words: str) -> tuple[int, list[str]]:
            status = await asyncio.to_thread(drain.main, [*words, "--router", router.published.admin])
            return status, capsys.readouterr().out.splitlines()

        assert await command() == (0, ["router serves, 0 requests under way"])
        asked = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: len(slow.requests) == 1, "the engine was asked")
        busy = ["router serves, 1 requests under way", "engine d0 is drained, 1 under way"]
        assert await command("d0", "--wait-secs", "0.1") == (1, busy)
        waits = asyncio.create_task(command("d0", "--wait-secs", "10"))
        slow.may.set()
        await asked
        assert await waits == (0, ["router serves, 0 requests under way", "engine d0 is drained, 0 under way"])
        assert await command("d0", "--undo") == (0, ["router serves, 0 requests under way"])
        assert await command("--all") == (0, ["router drains, 0 requests under way"])
        assert (await command("d9"))[0] == 2


@within(20)
async def test_a_named_engine_stays_drained_when_its_daemon_comes() -> None:
    named, other = FakeEngine("d0", "decode"), FakeEngine("d1", "decode")
    await named.start()
    await other.start()
    try:
        async with fleet(decodes=(named.url,), admin_port=0) as router:
            await router.seen(1)
            drained = f"named-{named.url.removeprefix('http://')}"
            assert (await told(router, "drain", {"engine_id": drained}))[0] == 200
            router.daemons[0].engines = [other, named]
            await until(lambda: {c.engine_id for c in router.outside.directory.snapshot()} >= {"d0", "d1"}, "both")
            for _ in range(3):
                assert (await router.ask(PROMPT))[1]["choices"][0]["text"] == "by d1"
            assert [engine["engine_id"] for engine in (await told(router, "drain"))[1]["engines"]] == ["d0"]
    finally:
        await named.stop()
        await other.stop()


@asynccontextmanager
async def program(tmp_path: Path, engine: FakeEngine, *flags: str) -> AsyncIterator[tuple[Process, str]]:
    """A router process that has one engine, and its URL."""
    file, key = tmp_path / "router.json", tmp_path / "key"
    key.touch(mode=0o600)
    key.write_bytes(KEY)
    words = ("--port", "0", "--control", "tcp://127.0.0.1:0", "--key-file", str(key), "--publish", str(file), *flags)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "pdx.router.main", *words)
    await engine.start()
    try:
        await until(file.exists, "the router listens")
        where = json.loads(file.read_bytes())
        async with FakeDaemon(daemon_ref(), [engine]).announcing(where["control"]):
            async with aiohttp.ClientSession() as client:
                await until(partial(answers, client, where["http"], 200), "it serves")
            yield process, where["http"] + "/v1/completions"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await engine.stop()


@within(30)
async def test_a_signal_lets_requests_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDX_RUN_DIR", str(tmp_path / "run"))
    slow = SlowEngine("d0")
    async with program(tmp_path, slow) as (process, url), aiohttp.ClientSession() as client:
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(_whole(client, url))
            await until(lambda: len(slow.requests) == 1, "the engine was asked")
            process.send_signal(signal.SIGTERM)
            await until(partial(answers, client, url.removesuffix("/v1/completions"), 503), "it has heard")
            async with client.post(url, json=PROMPT) as reply:
                assert reply.status == 503
            assert int(reply.headers["Retry-After"]) >= 1
            slow.may.set()
        assert asked.result().endswith(b"data: [DONE]\n\n")
        assert await process.wait() == 0


@within(30)
async def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDX_RUN_DIR", str(tmp_path / "run"))
    slow = SlowEngine("d0")
    async with program(tmp_path, slow, "--drain-secs", "60") as (process, url), aiohttp.ClientSession() as client:
        asked = asyncio.create_task(_whole(client, url))
        await until(lambda: len(slow.requests) == 1, "the engine was asked")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        with pytest.raises(aiohttp.ClientError):
            await asked
        await until(lambda: slow.dropped == 1, "the engine's request dropped")


async def answers(client: aiohttp.ClientSession, url: str, status: int) -> bool:
    async with client.get(f"{url}/readyz") as reply:
        return reply.status == status


async def _whole(client: aiohttp.ClientSession, url: str) -> bytes:
    async with client.post(url, json=STREAM) as reply:
        return await reply.read()
