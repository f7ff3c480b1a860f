"""API keys, tenants and web origins: by themselves, and at a router."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from engine_fakes import FakeEngine, fleet, within

from pdx.errors import ConfigError
from pdx.router.front.access import ApiKeys, Caller, Origins, read_keys

ALICE, BOB = "alice-" + "a" * 20, "bob-" + "b" * 20
KEYS = ApiKeys({ALICE: Caller("alice"), BOB: Caller("bob", "team-b")})
PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}


def key_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_whose_key_it_is() -> None:
    assert KEYS.caller({"Authorization": f"Bearer {ALICE}"}) == Caller("alice")
    assert KEYS.caller({"Authorization": f"bearer  {BOB} "}) == Caller("bob", "team-b")
    assert KEYS.caller({"x-api-key": BOB}) == Caller("bob", "team-b")
    wrong: list[dict[str, str]] = [
        {}, {"Authorization": ALICE}, {"Authorization": f"Basic {ALICE}"}, {"Authorization": f"Bearer {ALICE}x"},
        {"Authorization": "Bearer "}, {"x-api-key": ""}, {"x-api-key": "\udcff"}, {"Authorization": "Bearer \udcff"},
    ]  # fmt: skip
    assert not [headers for headers in wrong if KEYS.caller(headers)]
    assert not ApiKeys({})
    assert ALICE not in repr(KEYS)


def test_a_file_of_keys(tmp_path: Path) -> None:
    keys = read_keys([ALICE], key_file(tmp_path / "keys", f"# ours\n\nbob {BOB} team-b\n"))
    assert keys.caller({"x-api-key": ALICE}) == Caller("key1", is_apart=True)
    assert keys.caller({"x-api-key": BOB}) == Caller("bob", "team-b")


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        (f"bob {BOB}", 0o640, "chmod 600"),
        ("bob", 0o600, ":1: write NAME KEY"),
        (f"bob {BOB} team/b", 0o600, ":1: write NAME KEY"),
        (f"bob {BOB}\nbobby {BOB}", 0o600, ":2: this key is there already"),
        ("bob short", 0o600, "at least 16 characters: bob"),
    ],
)
def test_files_that_are_none(text: str, mode: int, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_keys([], key_file(tmp_path / "keys", text, mode))
    with pytest.raises(ConfigError, match="No such file"):
        read_keys([], str(tmp_path / "none"))


def test_no_salt_leads_out_of_a_tenant() -> None:
    ours, theirs = Caller("a", "a"), Caller("b", "b")
    salts = set()
    for caller in (ours, theirs):
        for given in (None, "", "a", "b", "b:a", "a:b", "a=b", "a/b", "a" * 64, "a" * 65, "\u2028", 7):
            body: dict[str, Any] = {} if given is None else {"cache_salt": given}
            assert caller.salted(body)
            assert re.split("[:=]", body["cache_salt"])[0] == caller.tenant
            salts.add(body["cache_salt"])
    assert len(salts) == 2 * 10
    body = {"cache_salt": "mine"}
    assert not Caller("c").salted(body)
    assert body == {"cache_salt": "mine"}


def test_no_salt_leads_into_a_tenant(tmp_path: Path) -> None:
    """Of clients that have none, where others have one: from a key file's line, and from the command line."""
    keys = read_keys([BOB], key_file(tmp_path / "keys", f"a {ALICE} acme\nc {'c' * 16}\n"))
    for key in (BOB, "c" * 16):
        caller = keys.caller({"x-api-key": key})
        assert caller is not None
        body: dict[str, Any] = {}
        assert not caller.salted(body)
        assert not body
        salts = set()
        for given in ("acme", "acme:x", ":acme", "acme/", "a" * 64):
            body = {"cache_salt": given}
            assert caller.salted(body)
            assert body["cache_salt"][0] in ":="
            salts.add(body["cache_salt"])
        assert len(salts) == 5


def test_origins() -> None:
    assert Origins(()).headers("https://a") == {}
    assert Origins(["https://a"]).headers("https://b") == {}
    assert Origins(["https://a"]).headers("") == {}
    assert Origins(["https://a"]).headers("https://a")["Access-Control-Allow-Origin"] == "https://a"
    assert Origins(["*"]).headers("https://b")["Access-Control-Allow-Origin"] == "https://b"


@pytest.mark.parametrize(
    ("allowed", "headers", "may"),
    [
        ((), {}, True),
        ((), {"Host": "a"}, True),
        ((), {"Origin": "https://b", "Host": "a"}, False),
        ((), {"Origin": "null", "Host": "a"}, False),
        ((), {"Origin": "null", "Host": ""}, False),
        ((), {"Origin": "http://[", "Host": "a"}, False),
        ((), {"Origin": "https://a:8443", "Host": "A:8443"}, True),
        (["https://b"], {"Origin": "https://b", "Host": "a"}, True),
        (["https://b"], {"Origin": "http://b", "Host": "a"}, False),
        (["*"], {"Origin": "https://c", "Host": "a"}, True),
    ],
)
def test_pages_that_may_ask(allowed: Sequence[str], headers: dict[str, str], may: bool) -> None:
    assert Origins(allowed).may_ask(headers) == may


@within(20)
async def test_a_router_with_keys() -> None:
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    async with fleet(p, d, keys=KEYS) as router:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": ALICE[:-1]}):
            status, answer, got = await router.ask(PROMPT, headers=headers)
            assert (status, answer["error"]["type"], got["WWW-Authenticate"]) == (401, "AuthenticationError", "Bearer")
            async with router.client.get(router.published.http + "/v1/models", headers=headers) as reply:
                assert reply.status == 401
        assert not p.requests
        status, _, _ = await router.ask(PROMPT, headers={"Authorization": f"Bearer {ALICE}"})
        assert status == 200
        assert all("Authorization" not in headers for headers in (*p.headers, *d.headers)), "engines don't see keys"
        assert "cache_salt" not in p.requests[0]
        status, _, _ = await router.ask({**PROMPT, "cache_salt": "mine"}, headers={"x-api-key": BOB})
        assert status == 200
        assert (p.requests[1]["cache_salt"], d.requests[1]["cache_salt"]) == ("team-b:mine", "team-b:mine")
        status, _, _ = await router.ask({**PROMPT, "n": 2}, headers={"x-api-key": BOB})
        assert (status, d.requests[2]["cache_salt"]) == (200, "team-b"), "an engine alone is told, too"
        url, upload = router.published.http + "/v1/audio/transcriptions", aiohttp.FormData({"model": "smol"})
        upload.add_field("file", b"x", filename="x.wav")
        async with router.client.post(url, data=upload, headers={"x-api-key": BOB}) as reply:
            assert reply.status == 403, "nothing keeps it apart by tenant"
        assert await router.metric('pdx_router_refused_total{reason="key"}') == 6
        assert await router.metric('pdx_router_key_requests_total{key="alice"}') == 1
        assert await router.metric('pdx_router_requests_total{code="401",model=""}') == 6


@pytest.mark.parametrize(("keys", "pass_keys"), [(KEYS, True), (ApiKeys({}), False)])
def test_keys_reach_engines_only_where_they_should(keys: ApiKeys, pass_keys: bool) -> None:
    @within(20)
    async def run() -> None:
        d = FakeEngine("d0", "decode")
        async with fleet(d, keys=keys, pass_keys=pass_keys) as router:
            assert (await router.ask(PROMPT, headers={"x-api-key": ALICE}))[0] == 200
            assert d.headers[0]["x-api-key"] == ALICE

    run()


@within(20)
async def test_web_pages() -> None:
    d = FakeEngine("d0", "decode")
    page, asks = {"Origin": "https://a"}, {"Access-Control-Request-Headers": "authorization"}
    async with fleet(d) as router:
        async with router.client.options(router.published.http + "/v1/completions", headers={**page, **asks}) as reply:
            assert reply.status == 403
        _, _, headers = await router.ask(PROMPT, headers=page)
        assert not [name for name in headers if name.lower().startswith("access-control")]
    async with fleet(d, origins=Origins(["https://a"]), keys=KEYS) as router:
        async with router.client.options(router.published.http + "/v1/completions", headers={**page, **asks}) as reply:
            assert (reply.status, reply.headers["Access-Control-Allow-Headers"]) == (204, "authorization")
        for body, status in ((PROMPT, 200), ({**PROMPT, "stream": True}, 200), ({**PROMPT, "model": "x"}, 404)):
            headers = {**page, "x-api-key": ALICE}
            async with router.post("/v1/completions", body, headers=headers) as reply:
                assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (status, "https://a")
        status, _, headers = await router.ask(PROMPT, headers=page)
        assert (status, headers["Access-Control-Allow-Origin"]) == (401, "https://a"), "a page may read why"
        status, answer, headers = await router.ask(PROMPT, headers={"Origin": "https://b", "x-api-key": ALICE})
        assert (status, "--cors-origin" in answer["error"]["message"]) == (403, True), "it came without a preflight"
        assert "Access-Control-Allow-Origin" not in headers


@within(20)
async def test_a_page_whose_name_leads_to_the_loopback_reaches_nothing() -> None:
    """DNS rebinding: its browser takes this router for the page's own host, and sends what it likes."""
    d = FakeEngine("d0", "decode")
    async with fleet(d) as router:
        for host in ("rebound.example", "rebound.example:8000", "127.0.0.1.rebound.example", "[::1", ""):
            status, answer, _ = await router.ask(PROMPT, headers={"Host": host})
            assert (status, "--api-key" in answer["error"]["message"]) == (403, True)
            async with router.client.get(router.published.http + "/v1/models", headers={"Host": host}) as reply:
                assert reply.status == 403
        assert not d.requests
        assert await router.metric('pdx_router_refused_total{reason="host"}') == 10
        for host in ("localhost", "localhost:1", "LOCALHOST", "127.0.0.1", "127.1.2.3:1", "[::1]:1", "[::1]"):
            assert (await router.ask(PROMPT, headers={"Host": host}))[0] == 200
        for path in ("/health", "/readyz", "/metrics"):  # probes and scrapers call hosts as they like
            async with router.client.get(router.published.http + path, headers={"Host": "rebound.example"}) as reply:
                assert reply.status == 200
    async with fleet(d, keys=KEYS) as router:  # which no page of others knows
        headers = {"Host": "front.example", "x-api-key": ALICE}
        assert (await router.ask(PROMPT, headers=headers))[0] == 200


@within(20)
async def test_metrics_only_where_operators_are() -> None:
    """They tell the names of keys to whom can read them."""
    line = "pdx_router_inflight 0.0"
    for public in (True, False):
        async with fleet(public_metrics=public, keys=KEYS, admin_port=0, admin_token="t0ken") as router:
            async with router.get("/metrics") as reply:
                assert (reply.status, line in await reply.text()) == ((200, True) if public else (404, False))
            url = f"{router.published.admin}/metrics"
            async with router.client.get(url) as reply:
                assert reply.status == 401
            async with router.client.get(url, headers={"Authorization": "Bearer t0ken"}) as reply:
                assert (reply.status, line in await reply.text()) == (200, True)
