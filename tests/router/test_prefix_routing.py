"""The router in front of real daemons: requests go where their prompt's blocks are, as the daemons say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from daemon.fleet import BareEngine, fleet_in, prompt_of
from daemon.fleet import Fleet as Daemons
from engine_fakes import FakeEngine, Fleet, fleet, until, within

from pdx.chain import block_hashes
from pdx.keys import tenant_of
from pdx.router.choice import prompts
from pdx.router.request.settings import Settings
from pdx.router.service import Options, running
from pdx.wire import EngineLoad, Renew, Role

ALGORITHM = "sha256_cbor/vllm-none-hash"
SHORT = {"model": "smol", "prompt": [1, 2, 3], "max_tokens": 4}
LETTERS = 480  # of a turn: more than a block, whatever the guess


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A busy machine is no reason to be without ids."""
    if "hangs" not in request.node.name:
        monkeypatch.setattr(prompts, "PATIENCE_MIN_S", 9.0)
        monkeypatch.setattr(prompts, "PATIENCE_MAX_S", 9.0)
        monkeypatch.setattr(prompts, "FORGIVEN_AFTER", 0)


class TextEngine(FakeEngine):
    """Its tokens are bytes."""

    def __init__(self, engine_id: str, role: Role) -> None:
        super().__init__(engine_id, role)
        self.tokenized = 0
        self.hangs = False

    async def _other(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        if request.path != "/tokenize":
            return web.json_response({"error": {"message": "no such path"}}, status=404)
        if self.hangs:
            await asyncio.Event().wait()
        self.tokenized += 1
        return web.json_response({"tokens": tokens_of(body)})


def tokens_of(body: dict[str, Any]) -> list[int]:
    if "messages" in body:
        return [1000, *"".join(message["content"] for message in body["messages"]).encode()]
    return list(body["prompt"].encode())


class Hosts:
    """Two hosts with a prefill engine each, one of them with a decode engine; the router's own part is real."""

    def __init__(
        self, router: Fleet, fleet: Daemons, engines: dict[str, TextEngine], bare: dict[str, BareEngine]
    ) -> None:
        self.router = router
        self.fleet = fleet
        self.engines = engines
        self.bare = bare

    async def ask(self, body: dict[str, Any], path: str = "/v1/completions") -> str:
        """The name of the prefill engine."""
        status, _, headers = await self.router.ask({"model": "m", "max_tokens": 4, **body}, path=path)
        assert status == 200
        return headers["x-pdx-prefill"]

    def hand_over(self, source: BareEngine, target: BareEngine) -> None:
        prompt, handle = prompt_of(64), self.fleet.handle(source, target)
        opened = source.open_send(prompt, handle)
        source.fill(opened, prompt, list(range(len(prompt.names))))
        assert target.load(prompt, handle) == 4
        source.let_go(opened.handoff_id, "send")

    def keep(self, name: str, tokens: list[int], salt: str = "") -> None:
        engine = self.bare[name]
        engine.keep(block_hashes(engine.info.content, tokens, salt=salt), tenant_of(salt))


@asynccontextmanager
async def hosts(folder: Path) -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:
        fleet = stack.enter_context(fleet_in(folder))
        settings = Settings(cluster_key=fleet.key_file.read_bytes(), journey="after")
        options = Options(settings=settings, port=0, control="tcp://127.0.0.1:0")
        served = await stack.enter_async_context(running(options))
        published = served.published
        client = await stack.enter_async_context(aiohttp.ClientSession())
        engines, bare = {}, {}
        daemons = [fleet.daemon(arena="16MiB") for _ in range(2)]
        places: list[tuple[str, Role, int]] = [("p0", "prefill", 0), ("p1", "prefill", 1), ("d0", "decode", 0)]
        for name, role, host in places:
            engines[name] = TextEngine(name, role)
            await engines[name].start()
            stack.push_async_callback(engines[name].stop)
            bare[name] = fleet.engine(
                daemons[host], name, role=role, algorithm=ALGORITHM, url=engines[name].url, router=published.control
            )
        router = Fleet(published, client, [], served.outside)
        await router.seen(3)
        yield Hosts(router, fleet, engines, bare)


def turn(chat: int, number: int) -> str:
    return f"chat {chat} turn {number} ".ljust(LETTERS, ".")


async def paces_told(here: Hosts) -> None:
    """What engines of a test take on a fast machine, or on a busy one, is nobody's pace."""
    for engine in here.bare.values():
        engine.scheduler.send(Renew(handoff_ids=[], tokens_per_s=100.0))
    await until(lambda: all(c.told_tokens_per_s for c in here.router.outside.snapshot()), "paces are told")


@within(60)
async def test_the_second_turn_goes_to_the_holder_of_the_first(tmp_path: Path) -> None:
    """Longer than what is expected after a dispatch stays in memory: only what the daemons say counts then."""
    async with hosts(tmp_path) as here:
        await paces_told(here)
        homes = {}
        for chat in range(4):
            homes[chat] = "p0" if chat % 3 else "p1"
            here.keep(homes[chat], tokens_of({"prompt": turn(chat, 1)}))
        await known(here, 4 * LETTERS // 16)
        for chat, home in homes.items():
            text = turn(chat, 1) + turn(chat, 2)
            assert await here.ask({"prompt": text}) == home
            assert await here.ask({"prompt": tokens_of({"prompt": text}) + [7] * 40}) == home, "as token ids"
        others = {await here.ask({"prompt": turn(0, 1), "cache_salt": f"tenant {n}"}) for n in range(4)}
        assert others == {"p0", "p1"}, "other tenants find nothing of it"


@within(60)
async def test_a_chat_goes_where_its_first_answer_was_prefilled(tmp_path: Path) -> None:
    """Before any daemon says so: what was sent there is expected there. Its ids are asked for once."""
    async with hosts(tmp_path) as here:
        await paces_told(here)
        messages = [{"role": "user", "content": turn(1, 1)}]
        home = await here.ask({"messages": messages}, "/v1/chat/completions")
        tokenized = sum(engine.tokenized for engine in here.engines.values())
        assert tokenized == 1
        for _ in range(4):
            assert await here.ask({"messages": messages}, "/v1/chat/completions") == home
        assert sum(engine.tokenized for engine in here.engines.values()) == tokenized
        longer = [*messages, {"role": "assistant", "content": "yes"}, {"role": "user", "content": turn(1, 2)}]
        assert await here.ask({"messages": longer}, "/v1/chat/completions") == home


@within(60)
async def test_a_completions_text_is_tokenized_once_for_all_engines(tmp_path: Path) -> None:
    async with hosts(tmp_path) as here:
        home = await here.ask({"prompt": turn(1, 1)})
        (asked,) = here.engines[home].requests
        assert asked["prompt"] == tokens_of({"prompt": turn(1, 1)})
        assert asked["kv_transfer_params"]["do_remote_decode"]


@within(60)
async def test_a_tokenizer_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    async with hosts(tmp_path) as here:
        for engine in here.engines.values():
            engine.hangs = True
        chosen = {await here.ask({"prompt": turn(n, 1)}) for n in range(4)}
        assert chosen == {"p0", "p1"}
        assert here.engines["p0"].requests[0]["prompt"] in [turn(n, 1) for n in range(4)], "as it came"


@within(60)
async def test_what_a_busy_host_keeps_is_brought_to_another(tmp_path: Path) -> None:
    """Its engine would take minutes, and the other one ten seconds to compute what a link brings in milliseconds."""
    async with hosts(tmp_path) as here:
        text = turn(1, 1) + turn(1, 2)
        p0, p1 = here.bare["p0"], here.bare["p1"]
        here.hand_over(p0, p1)  # so that the link has a pace
        for engine in here.bare.values():
            engine.scheduler.send(Renew(handoff_ids=[], tokens_per_s=100.0))
        here.keep("p0", tokens_of({"prompt": text}))
        await known(here, 60 + 4)
        await told(here)
        here.engines["p0"].fault = "hang"
        long = {"prompt": [*tokens_of({"prompt": text}), *range(20_000)]}
        busy = asyncio.create_task(here.ask(long))
        await until(lambda: bool(here.engines["p0"].requests), "it is in p0's line")
        assert await here.ask({"prompt": text + turn(1, 3)}) == "p1"
        hashes = block_hashes(p1.info.content, tokens_of({"prompt": text}))
        await until(lambda: p1.look_up(hashes) == 60, "they have come, in time or not")
        ended = [await here.router.metric(f'pdx_router_brought_total{{outcome="{how}"}}') for how in ("came", "late")]
        assert sum(ended) == 1
        busy.cancel()
        await asyncio.wait({busy})
        for daemon in {p0.daemon, p1.daemon}:
            daemon.wait_unleased()


@within(60)
async def test_a_router_that_comes_later_is_told_all_anew(tmp_path: Path) -> None:
    with fleet_in(tmp_path) as fleet:
        settings = Settings(cluster_key=fleet.key_file.read_bytes())
        options = Options(settings=settings, port=0, control="tcp://127.0.0.1:0")
        engine: BareEngine | None = None
        for _ in range(2):
            async with running(options) as router, aiohttp.ClientSession() as client:
                published = router.published
                options = msgspec.structs.replace(options, control=published.control)
                if engine is None:
                    daemon = fleet.daemon()
                    engine = fleet.engine(daemon, "p0", algorithm=ALGORITHM, url="http://x", router=published.control)
                    engine.keep(block_hashes(engine.info.content, list(range(320))))
                await known(Hosts(Fleet(published, client, [], router.outside), fleet, {}, {}), 20)


@within(20)
async def test_a_prompt_that_is_computed_sooner_than_handed_over_stays_with_one_engine() -> None:
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    async with fleet(p, d) as router:
        status, _, headers = await router.ask(SHORT)
        assert (status, headers["x-pdx-way"]) == (200, "after"), "nobody has told how fast it is"
        (daemon,) = router.daemons
        daemon.loads = [EngineLoad(engine_id=engine, tokens_per_s=2000.0) for engine in ("p0", "d0")]
        await until(lambda: all(c.told_tokens_per_s for c in router.outside.snapshot()), "now they have")
        status, _, headers = await router.ask(SHORT)
        assert (status, headers["x-pdx-way"], headers["x-pdx-reason"]) == (200, "alone", "short_prompt")
        status, _, headers = await router.ask({**SHORT, "prompt": list(range(100))})
        assert (status, headers["x-pdx-way"]) == (200, "after")
        assert await router.metric('pdx_router_alone_total{reason="short_prompt"}') == 1
        assert len(p.requests) == 2


@within(20)
async def test_a_request_to_an_engine_whose_daemon_has_left_does_not_bring_it_back() -> None:
    async with fleet(FakeEngine("d0", "decode")) as router:
        knowledge = router.outside.knowledge
        prompt = {**SHORT, "prompt": [1] * 64}
        assert (await router.ask(prompt))[0] == 200
        assert " 1 daemons, 4 expected" in repr(knowledge)
        await router.daemons[0].announce(leaving=True)
        await until(lambda: " 0 daemons" in repr(knowledge), "it has left")
        assert (await router.ask(prompt))[0] == 200, "its engines serve on"
        assert " 0 daemons" in repr(knowledge)


@within(20)
async def test_who_would_wait_too_long_is_told_at_once_when_to_come_again() -> None:
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    p.fault = "hang"
    async with fleet(p, d, max_wait_s=5.0) as router:
        (daemon,) = router.daemons
        daemon.loads = [EngineLoad(engine_id="p0", tokens_per_s=10.0)]
        await until(lambda: any(c.told_tokens_per_s for c in router.outside.snapshot()), "how fast it is")
        asked = asyncio.create_task(router.ask({**SHORT, "prompt": list(range(100))}))
        await until(lambda: len(p.requests) == 1, "it has enough to do for ten seconds")
        status, answer, headers = await router.ask({**SHORT, "prompt": list(range(100, 200))})
        assert (status, answer["error"]["code"], headers["x-pdx-reason"]) == (429, 429, "long_wait")
        assert 1 <= int(headers["Retry-After"]) <= 5
        status, _, headers = await router.ask(SHORT)
        assert (status, headers["x-pdx-reason"]) == (200, "prefill_saturated"), "decode has time for a little"
        asked.cancel()
        await until(lambda: p.dropped == 1, "the engine is free")
        p.fault = ""
        assert (await router.ask(SHORT))[0] == 200


async def told(here: Hosts) -> None:
    """Until all engines' pace has come to the router, and with it the links'."""

    async def all_told() -> bool:
        return all(engine["tokens_per_s"] for engine in (await here.router.readyz())["engines"])

    await until(all_told, "paces are told")


async def known(here: Hosts, blocks: int) -> None:
    """Until the router has heard of so many blocks."""
    await here.router.reaches("pdx_router_known_blocks", blocks)
