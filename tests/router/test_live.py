"""The live feed over HTTP: who is there, what has happened since, and a handoff's course on the router's clock."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from engine_fakes import MODEL, FakeEngine, Fleet, fleet, until, within
from test_admin import TOKEN, admin_of, answer, questions

from pdx.router.engines.directory import HEALTH_FAILURES_MAX, Directory
from pdx.router.live import feed as live_feed
from pdx.router.live.feed import placed
from pdx.router.live.values import Journal, Live
from pdx.verbs import Course, DaemonView, Mark, PageEvent

VIEW = DaemonView(
    arena_bytes=1000, leased_bytes=100, cached_bytes=300, cached_blocks=3, pinned_bytes=0, waiting=0,
    handoffs_under_way=0,
)  # fmt: skip
PROMPT = {"model": MODEL, "prompt": "hello"}


async def get(router: Fleet, path: str, **headers: str) -> tuple[int, bytes, Any]:
    """(status, body, headers)."""
    async with router.client.get(router.published.admin + path, headers=headers) as reply:
        return reply.status, await reply.read(), reply.headers


async def live(router: Fleet, since: Live | None = None) -> Live:
    query = f"?run={since.run}&since={since.next}" if since else ""
    status, body, _ = await get(router, f"/admin/live{query}")
    assert status == 200, body
    return msgspec.json.decode(body, type=Live)


@within(20)
async def test_a_request_is_told_with_its_steps_and_only_once() -> None:
    async with admin_of(FakeEngine("P", "prefill"), FakeEngine("D", "decode")) as router:
        before = await live(router)
        assert [(e.engine_id, e.role, e.health) for e in before.engines] == [
            ("D", "decode", "ready"), ("P", "prefill", "ready"),
        ]  # fmt: skip
        assert before.requests == []
        status, _, headers = await router.ask({**PROMPT, "stream": False})
        assert status == 200
        after = await live(router, before)
        (row,) = after.requests
        assert (row.code, row.way, row.prefill, row.decode) == (200, "after", "P", "D")
        assert (row.request_id, row.handoff) == (headers["X-Request-Id"], headers["x-pdx-handoff"])
        assert [step.what for step in row.steps] == [
            "chosen", "prefill_sent", "prefill_answered", "decode_sent", "decode_answered", "first_byte", "finished",
        ]  # fmt: skip
        assert [step.at_us for step in row.steps] == sorted(step.at_us for step in row.steps)
        assert (await live(router, after)).requests == []
        other = msgspec.structs.replace(after, run="another")
        assert [row.serial for row in (await live(router, other)).requests] == [1], "of another run all is new"


@within(20)
async def test_what_is_under_way_is_counted_and_who_leaves_is_told() -> None:
    engine = FakeEngine("D", "decode")
    async with admin_of(engine) as router:
        engine.fault = "hang"
        asking = asyncio.create_task(router.ask(PROMPT))
        await until(lambda: bool(engine.requests), "it has come")
        seen = await live(router)
        assert (seen.engines[0].in_flight, seen.engines[0].in_line) == (1, 1)
        assert [(row.code, row.reason) for row in seen.requests] == [(0, "no_pair")]
        asking.cancel()
        await until(lambda: engine.dropped == 1, "the engine's call is dropped")
        (row,) = (await live(router, seen)).requests
        assert (row.code, [step.what for step in row.steps][-2:]) == (499, ["client_gone", "finished"])


@within(20)
async def test_daemons_are_asked_once_in_a_while_however_many_look() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_feed, "VIEW_S", 60.0)
        async with admin_of(FakeEngine("a", "decode")) as router:
            looking = asyncio.create_task(live(router))
            await answer(router.daemons[0], 0, VIEW)
            await looking
            assert (await live(router)).daemons[0].view == VIEW
            assert len(questions(router.daemons[0])) == 1


@within(20)
async def test_daemons_are_asked_only_while_somebody_looks_and_hold_up_nobody() -> None:
    async with admin_of(FakeEngine("a", "decode"), FakeEngine("b", "decode"), hosts=2) as router:
        first, second = router.daemons
        assert not questions(first)
        looks = [asyncio.create_task(live(router)) for _ in range(5)]
        await answer(first, 0, VIEW)
        rows = {row.daemon: row for row in (await looks[0]).daemons}
        assert rows["d0"].view == VIEW
        assert rows["d1"].view is None
        await asyncio.gather(*looks)
        assert len(questions(first)) == len(questions(second)) == 1, "five looked, one asked"
        await answer(second, 0, {"a": "daemon of another version"})
        error = ""
        async with asyncio.timeout(10):
            while not error:
                error = {row.daemon: row.error for row in (await live(router)).daemons}["d1"]
        assert "unknown field" in error


@within(20)
async def test_a_handoffs_course_is_placed_on_the_routers_clock() -> None:
    async with admin_of(FakeEngine("P", "prefill"), FakeEngine("D", "decode"), hosts=2) as router:
        _, _, headers = await router.ask(PROMPT)
        handoff = headers["x-pdx-handoff"]
        asking = asyncio.create_task(get(router, f"/admin/live/{handoff}"))
        now_ns = 5_000_000_000
        course = Course(now_ns=now_ns, marks=[Mark("granted", now_ns - 1_000_000)], landed=[PageEvent(now_ns, 3, 7)])
        asked = await answer(router.daemons[1], 0, course)
        assert (asked.verb, asked.handoff_id.hex()) == ("course", handoff)
        _, body, _ = await asking  # the other daemon says nothing
        journal = msgspec.json.decode(body, type=Journal)
        told = {each.daemon: each for each in journal.daemons}
        assert "did not answer" in told["d0"].error
        decode = told["d1"]
        assert decode.sides == ["decode"]
        (mark,), (landed,) = decode.marks, decode.landed
        assert landed.at_us - mark.at_us == 1000
        assert (landed.layer, landed.pages) == (3, 7)
        assert journal.request.steps[-1].at_us < landed.at_us < 10_000_000
        for path, code in ((f"/admin/live/{'ab' * 16}", 404), ("/admin/live/abc", 404), ("/admin/live/xyz", 404)):
            assert (await get(router, path))[0] == code
        for path in ("/admin/live?since=x", "/admin/live?since=-1", f"/admin/live?since={'9' * 30}"):
            assert (await get(router, path))[0] == 400


def test_a_course_is_placed_by_the_middle_of_question_and_answer() -> None:
    # The daemon's clock shows 500 s when the router's shows 100 s: at 499.9 s there it was 99.9 s here.
    course = Course(now_ns=500_000_000_000, landed=[PageEvent(499_900_000_000, 0, 1)], whole=False)
    told = placed(course, "d", ["decode"], began_at=99.0, span=(99.996, 100.004))
    assert [event.at_us for event in told.landed] == [900_000]
    assert (told.within_us, told.whole) == (4000, False)


@within(20)
async def test_the_feed_wants_the_token_and_the_page_does_not() -> None:
    async with admin_of(token=TOKEN) as router:
        for path in ("/admin/live", f"/admin/live/{'ab' * 16}", "/dashboard/", "/dashboard.js"):
            assert (await get(router, path))[0] == 401
        assert (await get(router, "/admin/live", Authorization=f"Bearer {TOKEN}"))[0] == 200
        status, body, headers = await get(router, "/dashboard")
        assert status == 200
        assert TOKEN.encode() not in body
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    async with admin_of() as router:
        for path in ("/dashboard", "/admin/live"):
            assert (await get(router, path, Host="rebound.example"))[0] == 403
        async with router.get("/dashboard") as reply:
            assert reply.status == 404, "clients' port has no such page"


def test_health_says_how_an_engine_stands() -> None:
    from engine_fakes import daemon_ref, engine_info

    from pdx.wire import Announce

    directory = Directory()
    engine = engine_info("E", "decode")
    announce = Announce(daemon=daemon_ref(), engines=[engine])

    def health() -> str:
        return directory.known_engines()[0].health

    directory.on_announce(announce, 0.0)
    assert health() == "joining"
    directory.on_health("E", engine.url, True, 0.0)
    assert health() == "ready"
    directory.expire(5.0)
    assert health() == "alone"
    directory.on_announce(announce, 6.0)
    for _ in range(HEALTH_FAILURES_MAX):
        directory.on_health("E", engine.url, False, 6.0)
    assert health() == "lost"


@within(20)
async def test_without_an_admin_port_nothing_is_served() -> None:
    async with fleet() as router:
        for path in ("/dashboard", "/admin/live"):
            async with router.get(path) as reply:
                assert reply.status == 404
                assert json.loads(await reply.read())["error"]
