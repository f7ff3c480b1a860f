"""The live page in a browser: what it shows, what it survives, and that no text of others becomes anything but text."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Tab, chromium, tab
from engine_fakes import MODEL, FakeEngine, Fleet, fleet, until, within
from test_admin import TOKEN, admin_of, answer, questions
from test_live import VIEW

from pdx.router.live import dashboard
from pdx.wire import Answer, encode

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
PROMPT = {"model": MODEL, "prompt": "hello"}
ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'&amp;"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("browser")) as url:
        yield url


@asynccontextmanager
async def seen(browser: str, router: Fleet, *, complaints: bool = False) -> AsyncIterator[Tab]:
    """The page of this router; with nothing to complain of, if nothing else is said."""
    async with tab(browser, f"{router.published.admin}/dashboard") as page:
        await page.until("(document.getElementById('state')?.dataset.state ?? 'starting') !== 'starting'")
        yield page
        assert complaints or not page.complaints, page.complaints


def text_of(id_: str) -> str:
    return f"document.getElementById('{id_}').innerText"


ROWS = "document.querySelectorAll('#requests > li').length"


@within(40)
async def test_engines_daemons_and_requests_are_shown_and_only_what_changes_is_touched(browser: str) -> None:
    async with admin_of(FakeEngine("P", "prefill"), FakeEngine("D", "decode")) as router, seen(browser, router) as page:
        await answer(router.daemons[0], 0, VIEW)
        await page.until("document.getElementById('engines').tBodies[0].rows.length === 2")
        await page.until("document.querySelector('#daemons .arena span:last-child')?.innerText.includes('leased')")
        shown = await page.evaluate(text_of("engines"))
        assert all(word in shown for word in ("P", "D", "prefill", "decode", "ready", MODEL, "d0"))
        assert "100 B leased, 300 B cached, 600 B free" in await page.evaluate(text_of("daemons"))
        assert await page.evaluate(text_of("requests-none")) == "None yet."

        await router.ask(PROMPT)
        await page.until(f"{ROWS} === 1")
        await page.evaluate("""
            window.first = document.querySelector('#requests .row'); first.focus();
            window.engine = document.getElementById('engines').tBodies[0].rows[0]; undefined
        """)
        status, _, headers = await router.ask(PROMPT)
        assert status == 200
        await page.until(f"{ROWS} === 2")
        assert await page.evaluate("document.activeElement === first && first.isConnected && engine.isConnected")
        newest = "document.querySelector('#requests > li').innerText"  # the browser lays it out with its next frame
        await page.until(f"{newest}.includes({json.dumps(headers['X-Request-Id'])})")
        assert await page.evaluate("document.querySelectorAll('#requests .seg').length") >= 4


@within(40)
async def test_a_request_opens_by_keyboard_down_to_its_layers(browser: str) -> None:
    engines = FakeEngine("P", "prefill"), FakeEngine("D", "decode")
    async with admin_of(*engines, hosts=2) as router, seen(browser, router) as page:
        await router.ask(PROMPT)
        await page.until(f"{ROWS} === 1")
        asked = [len(questions(daemon)) for daemon in router.daemons]
        await page.evaluate("document.getElementById('which').focus()")
        await page.press("Tab")
        assert await page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
        await page.press("Enter")
        now_ns = 10**12
        for daemon, nth, marks in zip(router.daemons, asked, (["granted"], ["grant"]), strict=True):
            body = {
                "now_ns": now_ns, "marks": [[what, now_ns - 2_000_000, "wanted 4"] for what in marks],
                "landed": [[now_ns - 1_000_000 + layer, layer, 4] for layer in range(6)],
            }  # fmt: skip
            await answer_course(router, daemon, nth, body)
        await page.until("document.querySelector('.chart path.landed')?.getAttribute('d').split('M').length === 13")
        assert await page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
        detail = await page.evaluate("document.querySelector('.detail').innerText")
        for words in ("grant heard", "room granted at decode", "sent to prefill", "6 layers", "48 pages landed", "±"):
            assert words in detail
        await page.press("Enter")
        assert await page.evaluate("document.querySelector('.detail').hidden")


async def answer_course(router: Fleet, daemon: object, nth: int, body: dict[str, object]) -> None:
    """Among the questions for views, that for the handoff's course."""
    while True:
        asked = await answer(daemon, nth, body)  # type: ignore[arg-type]
        if asked.verb == "course":
            return
        nth += 1


@within(40)
async def test_what_clients_and_engines_say_is_only_ever_text(browser: str) -> None:
    evil = FakeEngine(f"D {ATTACK}", "decode", model=ATTACK)
    async with admin_of(evil) as router, seen(browser, router) as page:
        await router.ask({"model": ATTACK, "prompt": "x"}, headers={"X-Request-Id": ATTACK})
        evil.fault = "500"
        await router.ask({"model": ATTACK, "prompt": "x"})
        await page.until(f"{ROWS} === 2")
        await page.evaluate("document.querySelectorAll('#requests .row').forEach(row => row.click())")
        await page.until("document.querySelectorAll('.detail .marks').length === 2")
        assert await page.evaluate("document.querySelectorAll('img, script:not(body > script), iframe').length") == 0
        for where in ("engines", "requests"):
            assert ATTACK in await page.evaluate(text_of(where))
        assert await page.evaluate("document.querySelectorAll('script').length") == 1


@within(40)
async def test_the_policy_lets_nothing_be_made_of_text_even_by_mistake(browser: str) -> None:
    async with admin_of() as router, seen(browser, router, complaints=True) as page:
        for script in ("document.body.innerHTML = '<b>x</b>'", "document.write('x')", "fetch('http://127.0.0.1:1/')"):
            done = await page.evaluate(
                f"(async () => {{ try {{ await ({script}); return 'done' }} catch {{ return '' }} }})()"
            )
            assert done == "", script
        assert await page.evaluate("document.querySelector('h1').innerText") == "pdx"


@within(40)
async def test_the_token_is_asked_for_and_kept_nowhere(browser: str) -> None:
    async with (
        admin_of(FakeEngine("D", "decode"), token=TOKEN) as router,
        seen(browser, router, complaints=True) as page,
    ):
        await page.until("!document.getElementById('ask').hidden && document.activeElement.id === 'token'")
        assert await page.evaluate("document.getElementById('main').hidden")
        await page.type("wrong")
        await page.press("Enter")
        await page.until("document.getElementById('refused').textContent === 'It was not accepted.'")
        await page.type(TOKEN)
        await page.press("Enter")
        await page.until("!document.getElementById('main').hidden && document.getElementById('ask').hidden")
        await page.until("document.getElementById('engines').tBodies[0].rows.length === 1")
        kept = await page.evaluate(
            "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, "
            "document.documentElement.outerHTML, document.getElementById('token').value])"
        )
        assert TOKEN not in kept


@within(60)
async def test_it_survives_the_routers_restart_and_says_so(browser: str) -> None:
    async with AsyncExitStack() as life:
        router = await life.enter_async_context(admin_of(FakeEngine("D", "decode")))
        port = urlsplit(router.published.admin).port
        async with tab(browser, f"{router.published.admin}/dashboard") as page:
            await router.ask(PROMPT)
            await page.until(f"{ROWS} === 1")
            await life.aclose()
            await page.until("document.getElementById('state').innerText.includes('no answer since')")
            assert await page.evaluate(ROWS) == 1, "what was known stays"
            async with fleet(FakeEngine("E", "decode"), admin_port=port) as anew:
                await page.until("document.getElementById('note').innerText.includes('has started anew')")
                assert await page.evaluate("document.getElementById('state').innerText") == "live"
                await page.until("document.getElementById('engines').tBodies[0].rows[0]?.cells[0].innerText === 'E'")
                assert await page.evaluate(ROWS) == 0, "numbers begin again"
                await anew.ask(PROMPT)
                await page.until(f"{ROWS} === 1")


@within(60)
async def test_many_engines_and_more_requests_than_are_kept(browser: str) -> None:
    async with admin_of(FakeEngine("D", "decode")) as router:
        router.outside.recorder.keeps = 300
        daemon = router.daemons[0]
        daemon.engines += [FakeEngine(f"e{n:03}", "prefill", model=f"m{n % 7}") for n in range(200)]
        for engine in daemon.engines[1:]:
            engine.url = "http://127.0.0.1:1"
        await daemon.announce()
        async with seen(browser, router) as page:
            await page.until("document.getElementById('engines').tBodies[0].rows.length === 201")
            for _ in range(7):
                asked = [router.ask({"model": "m1", "prompt": "x"}) for _ in range(50)]
                assert {status for status, _, _ in await asyncio.gather(*asked)} == {503}
            await page.until(f"{ROWS} === 300 && document.querySelector('#requests > li').serial === 350")
            serials = await page.evaluate(
                "JSON.stringify([...document.querySelectorAll('#requests > li')].map(li => li.serial))"
            )
            assert json.loads(serials) == list(range(350, 50, -1))
            await page.evaluate("document.getElementById('find').focus()")
            await page.type("no such thing")
            await page.until("[...document.querySelectorAll('#requests > li')].every(li => li.hidden)")


@within(40)
async def test_what_is_not_well_is_said(browser: str) -> None:
    engine = FakeEngine("D", "decode")
    async with admin_of(engine) as router, seen(browser, router) as page:
        daemon = router.daemons[0]
        await until(lambda: bool(questions(daemon)), "its daemon is asked")
        await daemon.socket.send(encode(Answer(number=questions(daemon)[0].number, error="its disk has burnt")))
        engine.fault = "500"
        await router.ask(PROMPT)
        await page.until("document.querySelector('#requests .ended.bad')?.innerText.includes('502')")
        await page.until("document.querySelector('#daemons .bad')?.innerText.includes('its disk has burnt')")
        await engine.stop()
        await router.ask(PROMPT)
        await page.until("document.querySelector('.health')?.dataset.health === 'lost'")
        router.outside.gate.drain()
        await page.until("document.getElementById('reasons').innerText.includes('this router is draining')")


def test_every_mark_of_a_daemon_has_words() -> None:
    """What daemons note is shown in words, not by its name in the code."""
    source = "".join(path.read_text() for path in (ROOT / "pdx" / "daemon").glob("*.py"))
    noted = set(re.findall(r"trace\([\w.]*key, \"(\w+)\"", source)) - {"landed", "put", "sent"}
    assert {"granted", "open_send", "receive_ended"} <= noted
    script = (ROOT / "router" / "live" / "dashboard.js").read_text()
    assert [what for what in sorted(noted) if f"{what}:" not in script] == []


def test_the_page_is_whole() -> None:
    body = dashboard.page().body.decode()
    assert "/*style*/" not in body
    assert "/*script*/" not in body
    assert re.findall(r"https?://[^\"\s]*", body) == ["http://www.w3.org/2000/svg"] * 2, "a name, and no address"
    assert len(body) < 64 << 10
