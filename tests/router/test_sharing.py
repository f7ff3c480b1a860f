"""Blocks that are brought to where a prompt is computed: when it is worth it, and for how long it is waited for."""

from __future__ import annotations

import asyncio

import pytest
from engine_fakes import LAYOUT, daemon_ref, engine_info, until, within
from test_knowledge import holdings

from pdx.keys import short_names, tenant_of
from pdx.router.choice.blocks import Blocks
from pdx.router.choice.forecast import BRING_S, Bring, worth_bringing
from pdx.router.choice.knowledge import Found, Knowledge
from pdx.router.choice.policy import Candidate
from pdx.router.choice.prompt import Prompt
from pdx.router.choice.sharing import Sharing
from pdx.wire import ARENA_BIT, DaemonRef, Share

SPACE = b"s" * 24
TOKEN_BYTES = LAYOUT.layers * LAYOUT.page_bytes / LAYOUT.block_tokens
HASHES = [b"%032d" % n for n in range(10)]
NAMES = tuple(short_names(SPACE + tenant_of("alice"), HASHES))


def engine(name: str, **seen: object) -> Candidate:
    given = {"space": SPACE, "told_tokens_per_s": 1000.0, "links": {}, **seen}
    return Candidate(info=engine_info(name, "prefill"), daemon=daemon_ref(name), **given)  # type: ignore[arg-type]


FAST = {"p1": 1e9}
P0, P1 = engine("p0", links=FAST), engine("p1")


def kept(blocks: int, tokens: int = 4000, **others: Found) -> Prompt:
    return Prompt(tokens=tokens, found={SPACE: {"p0": Found(blocks, blocks, blocks), **others}})


@pytest.mark.parametrize(
    ("source", "target", "prompt", "blocks"),
    [
        (P0, P1, kept(100), 100),
        (P0, P1, kept(6), 0),  # 96 ms of computing
        (P0, P1, kept(7), 7),
        (P0, P1, kept(100, p1=Found(94)), 0),
        (P0, P1, kept(100, p1=Found(90)), 100),
        (P0, P1, Prompt(tokens=4000, found={SPACE: {"p0": Found(100, 100, 0)}}), 0),  # they are only expected there
        (engine("p0", links={"p1": TOKEN_BYTES * 1000}), P1, kept(200), 0),  # as slow as computing
        (engine("p0", links={"d0": 1e9}), P1, kept(100), 100),
        (engine("p0"), P1, kept(100), 0),  # nobody knows how fast
        (P0, engine("p1", told_tokens_per_s=0.0), kept(100), 0),
        (engine("p0", links=FAST, space=b"o" * 24), P1, kept(100), 0),
    ],
)  # fmt: skip
def test_when_it_is_worth_it(source: Candidate, target: Candidate, prompt: Prompt, blocks: int) -> None:
    bring = worth_bringing(target, [source, target], prompt)
    assert (bring.blocks if bring else 0) == blocks
    if bring is not None:
        assert (bring.source, bring.target) == (source, target)
        assert bring.seconds < blocks * 16 / 1000.0 - BRING_S


class Daemon:
    """The one that is told, and a knowledge of the other."""

    def __init__(self) -> None:
        self.knowledge = Knowledge()
        self.knowledge.on_holdings(holdings(0, dict.fromkeys(NAMES, ARENA_BIT), daemon="p0"))
        self.knowledge.on_holdings(holdings(0, {1: ARENA_BIT}, daemon="p1"))
        self.told: list[tuple[DaemonRef, Share]] = []
        self.outcomes: list[str] = []
        self.sharing = Sharing(self.knowledge, lambda ref, wish: self.told.append((ref, wish)), self.outcomes.append)

    def has(self, number: int, count: int) -> None:
        self.knowledge.on_holdings(holdings(number, dict.fromkeys(NAMES[:count], ARENA_BIT), daemon="p1"))
        self.sharing.heard("p1", 0.0)

    def bring(self, seconds: float = 60.0) -> asyncio.Task[None]:
        prompt = Prompt(tokens=200, blocks=Blocks.called({SPACE: HASHES}, salt="alice"))
        bring = Bring(P0, P1, 8, seconds)
        return asyncio.create_task(self.sharing.bring(bring, prompt, salt="alice"))


@within(20)
async def test_it_waits_until_the_other_daemon_has_all_of_it() -> None:
    here = Daemon()
    first, second = here.bring(), here.bring()
    await until(lambda: bool(here.told), "the holder was told")
    here.has(1, 7)
    here.sharing.heard("p0", 0.0)
    await asyncio.wait({first, second}, timeout=0.05)
    assert not first.done() and not second.done(), "one block is missing"
    here.has(2, 8)
    await asyncio.gather(first, second)
    ((ref, wish),) = here.told
    assert (ref, wish.to, wish.engine) == (P0.daemon, P1.daemon, "p1")
    assert (wish.space, wish.tenant, wish.block_hashes) == (SPACE, tenant_of("alice"), HASHES[:8])
    assert here.outcomes == ["came", "came"]
    assert repr(here.sharing) == "<Sharing 0 under way>"


@within(20)
async def test_what_does_not_come_in_time_is_computed() -> None:
    here = Daemon()
    await here.bring(seconds=0.0)
    assert here.outcomes == ["late"]
    here.has(1, 8)
    assert repr(here.sharing) == "<Sharing 0 under way>"


@within(20)
async def test_a_client_that_leaves_takes_nobody_with_it() -> None:
    here = Daemon()
    first, second = here.bring(), here.bring()
    await until(lambda: bool(here.told), "the holder was told")
    first.cancel()
    await asyncio.wait({first})
    here.has(1, 8)
    await second
    assert here.outcomes == ["came"]
