"""Bodies of many parts: counted before they are made."""

from __future__ import annotations

import json

import pytest

from pdx.router.front.bodies import CONTAINERS_MAX, ITEMS_MAX, STRINGS_MAX, decoded


@pytest.mark.parametrize(
    "part", [b"[]", b"{}", b'{"a":1}', b"[[]]", b'["\\\\"]'], ids=["lists", "objects", "pairs", "nested", "escaped"]
)
def test_a_body_of_a_million_things_is_refused_before_it_is_decoded(part: bytes) -> None:
    few, many = (b'{"messages":[' + b",".join([part] * count) + b"]}" for count in (1000, CONTAINERS_MAX + 1))
    assert len(decoded(few)["messages"]) == 1000
    with pytest.raises(ValueError, match="lists and objects"):
        decoded(many)


def test_so_is_one_of_many_strings_or_numbers() -> None:
    with pytest.raises(ValueError, match="strings"):
        decoded(b'{"x":[' + b",".join([b'""'] * (STRINGS_MAX + 1)) + b"]}")
    with pytest.raises(ValueError, match="items"):
        decoded(b'{"x":[' + b",".join([b"1"] * (ITEMS_MAX + 2)) + b"]}")
    assert len(decoded(b'{"prompt":[' + b",".join([b"1"] * 1_000_000) + b"]}")["prompt"]) == 1_000_000


def test_what_lies_in_a_text_is_a_text() -> None:
    document = json.dumps([{"a": [], "b": '"', "c": "\\"}] * CONTAINERS_MAX)
    raw = json.dumps({"prompt": document}).encode()
    assert decoded(raw) == {"prompt": document}


@pytest.mark.parametrize("raw", [b"", b"[", b"[]", b'{"a":', b'"' * 100, b'{"a":"' + b"\\" * 1_000_001, b"{" * 200_000])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="body"):
        decoded(raw)
