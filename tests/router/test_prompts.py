"""What is known of a prompt: whose ids are asked for, for how long, and under whose name they are remembered."""

from __future__ import annotations

import json
import threading
from typing import Any

import msgspec
import pytest
from aiohttp import web
from engine_fakes import CONTENT, FakeEngine, daemon_ref, within

from pdx.chain import block_hashes
from pdx.keys import short_names, space_of, tenant_of
from pdx.router.choice import blocks, prompts
from pdx.router.choice.knowledge import Found, Knowledge
from pdx.router.choice.policy import Candidate
from pdx.router.choice.prompt import Prompt
from pdx.router.choice.prompts import PATIENCE_MAX_S, PATIENCE_MIN_S, Prompts, patience_for, tokenize_question
from pdx.router.engines.upstream import Upstream
from pdx.router.request.servable import CHAT, COMPLETIONS

NAMED = msgspec.structs.replace(CONTENT, hash_algorithm="sha256_cbor/vllm-none-hash")
TEXT = "a text of more than one block, whatever the guess, and then some more"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A busy machine is no reason to be without ids."""
    if "patience" not in request.node.name:
        monkeypatch.setattr(prompts, "PATIENCE_MIN_S", 9.0)
        monkeypatch.setattr(prompts, "PATIENCE_MAX_S", 9.0)
        monkeypatch.setattr(prompts, "FORGIVEN_AFTER", 0)


class Tokenizer(FakeEngine):
    def __init__(self, engine_id: str, *, answer: Any = None, pairable: bool = True, **changed: Any) -> None:
        super().__init__(engine_id, "prefill", **{"content": NAMED, **changed})
        self.answer = answer
        self.pairable = pairable

    async def _other(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.requests.append(body)
        return web.json_response(self.answer or {"tokens": list(str(body.get("prompt")).encode())})

    def seen(self, **about: Any) -> Candidate:
        space = space_of(self.info.content, self.info.layout)
        about = {"pairable": self.pairable, **about}
        return Candidate(info=self.info, daemon=daemon_ref(self.engine_id), space=space, **about)


async def read(
    engines: list[Tokenizer], *bodies: dict[str, Any], path: str = COMPLETIONS, times: int = 1
) -> Prompt | None:
    """As a router with these engines reads them, one after the other, so many times; the last one's."""
    knowledge = Knowledge()
    names = short_names(engines[0].seen().space, block_hashes(NAMED, list(TEXT.encode())))
    knowledge.expect(names, daemon_ref(engines[0].engine_id), 0.0)
    async with Upstream() as upstream:
        for engine in engines:
            await engine.start()
        try:
            reader = Prompts(upstream, knowledge)
            for turn, body in enumerate(bodies * times):
                snapshot = tuple(engine.seen() for engine in engines)
                reading = reader.ask(path, body, "smol", snapshot, turn=turn, headers={})
                prompt = await reader.read(reading, 1.0) if reading is not None else None
            return prompt
        finally:
            for engine in engines:
                await engine.stop()


@within(20)
async def test_a_text_is_asked_for_once_and_finds_its_blocks() -> None:
    engines = [Tokenizer("p0"), Tokenizer("p1")]
    for prompt in (TEXT, [TEXT]):
        found = await read(engines, {"prompt": prompt}, times=3)
        assert found is not None
        assert found.token_ids == list(TEXT.encode())
        assert found.cached_tokens(engines[0].seen()) == len(TEXT) // 16 * 16
        assert found.cached_tokens(engines[1].seen()) == 0
    assert [len(engine.requests) for engine in engines] == [2, 0]


@within(20)
async def test_what_nobody_has_is_named_by_its_first_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest when it is on its way: hashing a prompt takes longer than anything else here."""
    hashed: list[int] = []

    def counted(content: Any, ids: Any, **about: Any) -> list[bytes]:
        hashed.append(len(ids))
        return block_hashes(content, ids, **about)

    monkeypatch.setattr(blocks, "block_hashes", counted)
    engine = Tokenizer("p0")
    cold, warm = list(range(500)), list(TEXT.encode())
    for ids, lengths in ((cold, [16]), (warm, [16, len(warm)])):
        hashed.clear()
        found = await read([engine], {"prompt": ids})
        assert found is not None
        assert hashed == lengths
    found = await read([engine], {"prompt": cold})
    assert found is not None
    names = tuple(short_names(engine.seen().space, block_hashes(NAMED, cold)))
    assert found.names_at(engine.seen()) == names
    assert found.blocks is not None
    assert found.blocks.first_name(engine.seen().space) == names[:1]
    assert found.blocks.names(b"another space") == ()


@within(20)
async def test_token_ids_are_read_as_they_are() -> None:
    engines = [Tokenizer("p0"), Tokenizer("p1")]
    for prompt in (list(TEXT.encode()), [list(TEXT.encode())]):
        found = await read(engines, {"prompt": prompt})
        assert found is not None
        assert found.cached_tokens(engines[0].seen()) == len(TEXT) // 16 * 16
    assert not engines[0].requests and not engines[1].requests


@within(20)
async def test_ids_are_those_of_the_content_whose_engine_was_asked() -> None:
    """Two revisions of a model have one name, and perhaps two tokenizers."""
    revised = msgspec.structs.replace(NAMED, weights="revised")
    old = Tokenizer("old", answer={"tokens": [1] * 20})
    new = Tokenizer("new", answer={"tokens": [9] * 20}, content=revised)
    for turns, asked, other in ((1, old, new), (2, new, old), (3, old, new)):
        found = await read([old, new], {"prompt": TEXT}, times=turns)
        assert found is not None
        assert found.ids_at(asked.seen()) == asked.answer["tokens"]
        assert found.ids_at(other.seen()) is None
    assert (len(old.requests), len(new.requests)) == (3, 2), "each is asked once"
    given = await read([old, new], {"prompt": [5] * 20})
    assert given is not None
    assert given.ids_at(old.seen()) == given.ids_at(new.seen()) == [5] * 20


@within(20)
async def test_whom_no_daemon_announces_tokenizes_for_nobody() -> None:
    announced = [Tokenizer(name) for name in ("p0", "p1")]
    others = [Tokenizer(name, pairable=False) for name in ("x0", "x1")]
    for engines in ([*others, *announced], others):
        await read(engines, *({"prompt": f"{turn} {TEXT}"} for turn in range(4)))
    assert [len(engine.requests) for engine in (*others, *announced)] == [0, 0, 2, 2]


@within(20)
async def test_another_tenant_finds_nothing_and_asks_for_itself() -> None:
    """That ids are remembered would tell one tenant, by the time, what another has asked."""
    engines = [Tokenizer("p0"), Tokenizer("p1")]
    found = await read(engines, {"prompt": TEXT}, {"prompt": TEXT, "cache_salt": "alice"}, times=2)
    assert sum(len(engine.requests) for engine in engines) == 2
    assert found is not None
    names = short_names(
        engines[0].seen().space + tenant_of("alice"), block_hashes(NAMED, found.token_ids, salt="alice")
    )
    assert found.names_at(engines[0].seen()) == tuple(names)
    assert found.cached_tokens(engines[0].seen()) == 0


@pytest.mark.parametrize(
    "answer", [{"tokens": []}, {"tokens": [1, -1]}, {"tokens": "no"}, {"error": {"message": "no"}}, [1]]
)
def test_what_is_no_answer_leaves_the_length(answer: Any) -> None:
    @within(20)
    async def test() -> None:
        found = await read([Tokenizer("p0", answer=answer), Tokenizer("p1")], {"prompt": TEXT})
        assert found == Prompt(tokens=1 + len(TEXT) // 3)

    test()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": 7}),
        (COMPLETIONS, {"prompt": ["x", 1]}),
        (COMPLETIONS, {"prompt": [1.5]}),
        (COMPLETIONS, {"prompt": TEXT, "cache_salt": 7}),
        (COMPLETIONS, {}),
        (CHAT, {"messages": 7}),
        (CHAT, {"messages": [7, {"content": {"text": 7}}]}),
    ],
)
def test_nonsense_is_the_engines_to_refuse(path: str, body: dict[str, Any]) -> None:
    @within(20)
    async def test() -> None:
        found = await read([Tokenizer("p0"), Tokenizer("p1")], body, path=path)
        assert found is None or found.blocks is None

    test()


@within(20)
async def test_what_tokens_do_not_name_has_no_names() -> None:
    engines = [Tokenizer("p0", adapters={"smol": "aa"}), Tokenizer("p1")]
    found = await read(engines, {"prompt": list(TEXT.encode())})
    assert found is not None
    assert (found.tokens, found.blocks) == (len(TEXT), None)
    other = [
        Tokenizer(name, content=msgspec.structs.replace(CONTENT, hash_algorithm="pickled")) for name in ("p0", "p1")
    ]
    found = await read(other, {"prompt": list(TEXT.encode())})
    assert found is not None
    assert found.work_tokens(other[0].seen()) == len(TEXT)


@within(20)
async def test_of_a_prompt_that_is_cut_the_whole_ones_tokens_say_nothing() -> None:
    engines = [Tokenizer("p0"), Tokenizer("p1")]
    found = await read(engines, {"prompt": TEXT, "truncate_prompt_tokens": 16})
    assert found == Prompt(tokens=1 + len(TEXT) // 3)
    found = await read(engines, {"prompt": list(TEXT.encode()), "truncate_prompt_tokens": 16})
    assert found is not None
    assert found.blocks is None
    assert not engines[0].requests and not engines[1].requests


def test_patience_is_what_choosing_can_be_worth() -> None:
    p0, p1, d0 = Tokenizer("p0"), Tokenizer("p1"), Tokenizer("d0")
    d0.role = "decode"
    two = [p0.seen(tokens_per_s=1000.0), p1.seen()]
    assert patience_for(10_000, [p0.seen(), d0.seen()]) == 0.0, "there is nothing to choose"
    assert patience_for(15, two) == 0.0, "there is no block to find"
    assert patience_for(100, two) == PATIENCE_MIN_S
    assert patience_for(4000, two) == pytest.approx(0.2)
    assert patience_for(40_000, two) == PATIENCE_MAX_S
    assert patience_for(100, two, takes_s=0.004) == PATIENCE_MIN_S
    assert patience_for(100, two, takes_s=0.006) == 0.0, "what it takes is more than it saves"


@within(20)
async def test_a_prompt_that_every_engine_will_refuse_is_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    monkeypatch.setattr(blocks, "block_hashes", lambda *_, **__: hashed.append(1) or [])
    for context, times in ((64, 0), (0, 1)):
        engines = [Tokenizer(name, context_tokens=context) for name in ("p0", "p1")]
        found = await read(engines, {"prompt": list(range(1000, 1065))})
        assert found is not None
        assert (found.tokens, len(hashed)) == (65, times)


@within(20)
async def test_a_long_prompt_is_hashed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def hashes(*about: Any, **more: Any) -> list[bytes]:
        threads.append(threading.current_thread())
        return block_hashes(*about, **more)

    monkeypatch.setattr(prompts, "TOKENS_AT_ONCE", 10)
    monkeypatch.setattr(blocks, "block_hashes", hashes)
    engines = [Tokenizer("p0"), Tokenizer("p1")]
    found = await read(engines, {"prompt": list(TEXT.encode())})
    assert found is not None
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
    assert found.cached_tokens(engines[0].seen()) == len(TEXT) // 16 * 16


@within(20)
async def test_who_was_slow_as_a_rule_is_asked_again_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "FORGIVEN_AFTER", 4)
    for slow, expected in ((1, "aaaaaa"), (3, "uuuuau"), (5, "uuuuau")):
        assert "".join(await asked_after(slow, prompts=6)) == expected


async def asked_after(slow: int, *, prompts: int) -> list[str]:
    """What is done about these, when of the last five answers so many were slow: a(sk), u(nasked)."""
    engines, counted = [Tokenizer("p0"), Tokenizer("p1")], list[str]()
    async with Upstream() as upstream:
        for engine in engines:
            await engine.start()
        try:
            reader = Prompts(upstream, Knowledge(), count=lambda ids: counted.append(ids[0]))
            reader._took_s.extend([0.0] * (5 - slow) + [100.0] * slow)
            for turn in range(prompts):
                body, snapshot = (
                    {"prompt": f"{turn} {TEXT}"},
                    tuple(engine.seen(tokens_per_s=1.0) for engine in engines),
                )
                reading = reader.ask(COMPLETIONS, body, "smol", snapshot, turn=turn, headers={})
                assert reading is not None
                await reader.read(reading, 1.0)
        finally:
            for engine in engines:
                await engine.stop()
    return counted


def test_a_chat_is_asked_for_with_all_that_makes_its_prompt() -> None:
    tools = [{"type": "function"}]
    body = {"model": "smol", "messages": [1], "tools": tools, "stream": True, "chat_template": None}
    assert json.loads(tokenize_question(CHAT, body)) == {"model": "smol", "messages": [1], "tools": tools}
    text = {"model": "smol", "prompt": ["x"], "add_special_tokens": False, "tools": tools}
    assert json.loads(tokenize_question(COMPLETIONS, text)) == {
        "model": "smol", "prompt": "x", "add_special_tokens": False,
    }  # fmt: skip


def test_work_is_what_is_not_kept() -> None:
    engine = Tokenizer("p0").seen()
    prompt = Prompt(tokens=100, found={engine.space: {"p0": Found(6, 2)}})
    assert prompt.cached_tokens(engine) == 96
    assert prompt.work_tokens(engine) == 4 + 32, "what is on the disk counts by half"
    assert Prompt(tokens=96, found={engine.space: {"p0": Found(6, 6)}}).work_tokens(engine) == 1
