"""What the admin port takes from whom: guards, malformed bodies, and answers from those who were not asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from engine_fakes import CONTENT, LAYOUT, MODEL, FakeDaemon, FakeEngine, Fleet, fleet, until, within
from msgspec import structs, to_builtins

from pdx.keys import space_of
from pdx.router.main import main
from pdx.verbs import Clear, Cleared, Found, Lookup, SpaceInfo, Spaces, TierCleared
from pdx.wire import Answer, Ask, encode

TOKEN = "t0ken"
LOOKUP = {"tokens": list(range(40))}
FOUND = Found(blocks=2, tokens=32, arena_blocks=1, disk_blocks=1, generation=7)


@asynccontextmanager
async def admin_of(*engines: FakeEngine, token: str = "", hosts: int = 1) -> AsyncIterator[Fleet]:
    async with fleet(*engines, hosts=hosts, admin_port=0, admin_token=token) as running:
        yield running


async def ask(router: Fleet, verb: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """(status, JSON)."""
    url = f"{router.published.admin}/admin/kv/{verb}"
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **headers}
    async with router.client.request("GET" if data is None else "POST", url, data=data, headers=given) as reply:
        return reply.status, json.loads(await reply.read())


def questions(daemon: FakeDaemon) -> list[Ask]:
    return [message for message in daemon.heard if isinstance(message, Ask)]


async def answer(daemon: FakeDaemon, nth: int, body: Any, *, number: int | None = None) -> Ask:
    """Its nth question, once it is there and answered."""
    await until(lambda: len(questions(daemon)) > nth, "a question")
    asked = questions(daemon)[nth]
    await daemon.socket.send(encode(Answer(number=asked.number if number is None else number, body=to_builtins(body))))
    return asked


def spaces() -> Spaces:
    content = structs.replace(CONTENT, hash_algorithm="sha256_cbor/vllm-none-hash")
    return Spaces(spaces=[SpaceInfo(content=content, layout=LAYOUT, attached=1)])


@within(20)
async def test_a_lookup_is_asked_of_each_daemon_by_its_own_names() -> None:
    async with admin_of(FakeEngine("d0", "decode")) as router:
        asking = asyncio.create_task(ask(router, "lookup", LOOKUP))
        await answer(router.daemons[0], 0, spaces())
        asked = await answer(router.daemons[0], 1, FOUND)
        assert isinstance(asked.verb, Lookup)
        assert len(asked.verb.block_hashes) == 2
        status, report = await asking
        assert status == 200
        assert (report["model"], report["prompt_tokens"]) == (MODEL, 40)
        assert report["daemons"][0]["results"] == [{"type": "found", **to_builtins(FOUND)}]


@within(20)
async def test_of_a_model_a_daemon_is_told_all_spaces_that_any_has_met() -> None:
    async with admin_of(FakeEngine("a", "decode"), FakeEngine("b", "decode"), hosts=2) as router:
        first, second = router.daemons
        asking = asyncio.create_task(ask(router, "clear", {"model": MODEL}))
        await answer(first, 0, spaces())
        await answer(second, 0, Spaces(spaces=[]))
        (met,) = spaces().spaces
        for daemon in router.daemons:
            asked = await answer(daemon, 1, Cleared(arena=TierCleared(), disk=TierCleared()))
            assert isinstance(asked.verb, Clear)
            assert (asked.verb.model, asked.verb.spaces) == (MODEL, [space_of(met.content, met.layout)])
        assert (await asking)[0] == 200


@within(20)
async def test_only_who_was_asked_can_answer() -> None:
    async with admin_of(FakeEngine("a", "decode"), FakeEngine("b", "decode"), hosts=2) as router:
        first, second = router.daemons
        asking = asyncio.create_task(ask(router, "stats"))
        await until(lambda: all(questions(daemon) for daemon in router.daemons), "both are asked")
        await answer(second, 0, {"forged": 1}, number=questions(first)[0].number)
        await answer(second, 0, {"by": "b"})
        await answer(second, 0, {"by": "b", "twice": 1})
        await answer(first, 0, {"by": "a"})
        status, report = await asking
        assert status == 200
        assert {each["daemon"]: each["body"] for each in report["daemons"]} == {"d0": {"by": "a"}, "d1": {"by": "b"}}


@within(20)
async def test_a_daemon_that_has_left_is_not_asked() -> None:
    async with admin_of(FakeEngine("d0", "decode")) as router:
        await router.daemons[0].announce(leaving=True)
        async with asyncio.timeout(10):
            while (await ask(router, "stats"))[1]["daemons"]:
                pass
        assert (await ask(router, "lookup", LOOKUP))[0] == 400


@pytest.mark.parametrize(
    ("verb", "body", "complaint"),
    [
        ("lookup", b"{", "the body"),
        ("lookup", [], "the body"),
        ("lookup", {}, "one of tokens, text and messages"),
        ("lookup", {"text": "a", "tokens": [1]}, "one of"),
        ("lookup", {"text": "a", "lora_name": "x"}, "lora_name"),
        ("lookup", {"text": "a", "tools": []}, "belong to messages"),
        ("lookup", {"tokens": ["a"]}, "tokens"),
        ("pin", {"text": "a", "name": ""}, "length"),
        ("pin", {"text": "a", "name": "n", "ttl_s": 1e9}, "ttl_s"),
        ("unpin", {}, "name"),
        ("clear", {}, "say which blocks"),
        ("clear", {"tier": "tape"}, "tier"),
        ("clear", {"everything": True, "older_s": -1}, "older_s"),
    ],
)
def test_malformed_bodies_are_refused_by_name(verb: str, body: Any, complaint: str) -> None:
    @within(20)
    async def run() -> None:
        async with admin_of() as router:
            status, error = await ask(router, verb, body)
            assert status == 400
            assert complaint in error["error"]["message"]

    run()


@within(20)
async def test_with_a_token_nobody_else_is_heard() -> None:
    async with admin_of(token=TOKEN) as router:
        for given in ({}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}, {"Authorization": "Bearer töken"}):
            assert (await ask(router, "stats", **given))[0] == 401
            assert (await ask(router, "nothing", **given))[0] == 401
        assert (await ask(router, "lookup", {}, Authorization=f"Bearer {TOKEN}"))[0] == 400, "it was read"


@within(20)
async def test_on_loopback_a_web_page_can_send_nothing() -> None:
    async with admin_of() as router:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            status, _ = await ask(router, "clear", {"everything": True}, **{"Content-Type": kind})
            assert status == 415
        assert (await ask(router, "clear", {"everything": True}, Host="rebound.example"))[0] == 403
        for name in ("rebound.example:80", "127.0.0.1.rebound.example", "127.0.0.1.rebound.example:80"):
            assert (await ask(router, "stats", Host=name))[0] == 403
        for name in ("localhost", "127.0.0.1:1", "[::1]:1"):
            assert (await ask(router, "lookup", {}, Host=name))[0] == 400, "it was read"


@within(20)
async def test_the_front_knows_nothing_of_it() -> None:
    async with admin_of() as router:
        async with router.get("/admin/kv/stats") as reply:
            assert reply.status == 404
        for path in ("/", "/admin/kv/trace", "/v1/models"):
            async with aiohttp.ClientSession() as session, session.get(router.published.admin + path) as reply:
                assert reply.status == 404


def test_off_loopback_it_wants_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--admin-port", "0", "--admin-host", "0.0.0.0"]) == 2
    assert "--admin-host 0.0.0.0 is not loopback and no cluster key is set" in capsys.readouterr().err
