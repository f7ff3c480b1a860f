"""Engines that operators name: served whole without a daemon, paired with one, missed until they come."""

from __future__ import annotations

from engine_fakes import FakeEngine, Fleet, fleet, within

PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}


async def misses(router: Fleet, word: str) -> bool:
    return any(word in reason for reason in (await router.readyz())["reasons"])


@within(20)
async def test_an_engine_that_knows_nothing_of_pdx_serves_whole_requests() -> None:
    plain = FakeEngine("d0", "decode")
    await plain.start()
    try:
        async with fleet(decodes=(plain.url + "/",)) as router:
            await router.seen(1)
            status, answer, headers = await router.ask(PROMPT)
            assert (status, answer["choices"][0]["text"], headers["x-pdx-way"]) == (200, "by d0", "alone")
            assert headers["x-pdx-reason"] == "no_pair"
            assert "kv_transfer_params" not in plain.requests[0]
    finally:
        await plain.stop()


@within(20)
async def test_it_gives_way_to_what_its_daemon_announces() -> None:
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    await p.start()
    await d.start()
    try:
        async with fleet(prefills=(p.url,), decodes=(d.url,)) as router:
            await router.seen(1)
            assert await misses(router, "prefill engine")
            assert (await router.ask(PROMPT))[2]["x-pdx-reason"] == "no_pair"
            router.daemons[0].engines = [p, d]
            await router.seen(2)
            assert not await misses(router, "prefill engine")
            _, _, headers = await router.ask(PROMPT)
            assert (headers["x-pdx-prefill"], headers["x-pdx-decode"]) == ("p0", "d0")
    finally:
        await p.stop()
        await d.stop()


@within(20)
async def test_one_that_never_comes_is_named() -> None:
    async with fleet(FakeEngine("d0", "decode"), decodes=("http://127.0.0.1:1",)) as router:
        assert await misses(router, "http://127.0.0.1:1")
        assert (await router.ask(PROMPT))[0] == 200
