"""How urgent a request is and how long it waits, as its headers and body say."""

from __future__ import annotations

import math

import pytest

from pdx.router.front.access import Caller
from pdx.router.line.wishes import wish_of


def test_nothing_is_said() -> None:
    wish = wish_of({}, {}, size_bytes=7)
    assert (wish.tenant, wish.priority, wish.ttl_s, wish.size_bytes) == ("", 0, math.inf, 7)


@pytest.mark.parametrize(
    ("header", "field", "priority"),
    [(None, 5, 5), (None, -(2**40), -100), (None, "x", 0), ("-3", 5, -3), ("100", None, 100)],
)
def test_priority(header: str | None, field: object, priority: int) -> None:
    headers = {} if header is None else {"x-pdx-priority": header}
    assert wish_of(headers, {"priority": field}, size_bytes=0).priority == priority


@pytest.mark.parametrize("text", ["", "101", "-101", "1.5", "--1", "1" * 99, "\u0661", "nan"])
def test_bad_priority(text: str) -> None:
    if text == "\u0661":  # a digit, for Python
        assert wish_of({"x-pdx-priority": text}, {}, size_bytes=0).priority == 1
        return
    with pytest.raises(ValueError, match="from -100 to 100"):
        wish_of({"x-pdx-priority": text}, {}, size_bytes=0)


def test_ttl() -> None:
    assert wish_of({"x-pdx-ttl-secs": "2.5"}, {}, size_bytes=0).ttl_s == 2.5
    for text in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(ValueError, match="positive number of seconds"):
            wish_of({"x-pdx-ttl-secs": text}, {}, size_bytes=0)


def test_tenants_are_told_apart_and_not_named() -> None:
    said = [
        ({"Authorization": "Bearer secret-a"}, {}),
        ({"Authorization": "Bearer secret-b"}, {}),
        ({"x-api-key": "secret-c"}, {}),
        ({}, {"cache_salt": "salt"}),
        ({}, {"cache_salt": 7}),
    ]
    tenants = [wish_of(headers, body, size_bytes=0).tenant for headers, body in said]
    assert len(set(tenants)) == 5
    assert tenants[-1] == ""
    assert not any("secret" in tenant or "salt" in tenant for tenant in tenants)
    assert wish_of({"Authorization": "Bearer secret-a"}, {"cache_salt": "x"}, size_bytes=0).tenant == tenants[0]


def test_a_keys_tenant_is_its_own_however_it_is_sent() -> None:
    """Who could choose another name in each request would have a turn for each."""
    caller = Caller("one")
    said = [{"Authorization": "Bearer  secret"}, {"Authorization": "Bearer secret"}, {"x-api-key": "secret"}]
    assert {wish_of(headers, {}, size_bytes=0, caller=caller).tenant for headers in said} == {"one"}
    assert wish_of({}, {}, size_bytes=0, caller=Caller("two", "acme")).tenant == "acme"
