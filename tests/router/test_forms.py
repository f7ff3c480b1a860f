"""Forms that clients upload: which model they name, whatever else is in them."""

from __future__ import annotations

import random

import aiohttp
import msgspec
import pytest
from engine_fakes import CONTENT, FakeEngine, fleet, within

from pdx.router.front.forms import HEAD_BYTES_MAX, PARTS_MAX, field_of

TYPE = "multipart/form-data; boundary=xYz"
OTHER = msgspec.structs.replace(CONTENT, model="other", weights="cd34")


def part(name: str, value: bytes, more: str = "", boundary: str = "xYz") -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes, boundary: str = "xYz") -> bytes:
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


FILE = part("file", b"--xYz\n\r\n\r\n--xY" + bytes(range(256)), '; filename="model"\r\nContent-Type: audio/wav')


def test_a_field_is_found_wherever_it_is() -> None:
    for parts in ((part("model", b"m"), FILE), (FILE, part("model", b"m")), (FILE, part("model", b"m"), FILE)):
        assert field_of(form(*parts), TYPE, "model") == "m"
    assert field_of(form(part("x", b"", "x" * HEAD_BYTES_MAX), part("model", b"m")), TYPE, "model") == "m"
    quoted = form(part("model", b"m", boundary="a b"), boundary="a b")
    assert field_of(quoted, 'multipart/form-data; boundary="a b"', "model") == "m"
    assert field_of(form(part("model", b"")), TYPE, "model") == ""
    assert field_of(form(part("model", b"m\xff")), TYPE, "model") == "m\ufffd"
    assert field_of(form(part("model", b"m").replace(b'"model"', b"model")), TYPE, "model") == "m"


def test_none_is_found_where_none_is() -> None:
    whole = form(FILE, part("model", b"m"))
    for raw, content_type in (
        (form(FILE), TYPE), (b"", TYPE), (whole, "multipart/form-data"), (whole, "multipart/form-data; boundary=xy"),
        (whole, "multipart/form-data; boundary=\udcff"), (whole[:-8].removesuffix(b"\r\n"), TYPE),
        (form(*[part("x", b"")] * PARTS_MAX, part("model", b"m")), TYPE),
        (form(part("model", b"m", "x" * HEAD_BYTES_MAX)), TYPE), (whole, TYPE + " " * HEAD_BYTES_MAX),
    ):  # fmt: skip
        assert field_of(raw, content_type, "model") is None


def test_no_bytes_make_it_raise() -> None:
    luck, whole = random.Random(3), form(FILE, part("model", b"m"))
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(luck.randrange(1, 9)):
            at = luck.randrange(len(raw))
            raw[at : at + luck.randrange(3)] = luck.choice((b"", b'"', b";", b"*=", b"\r\n", luck.randbytes(2)))
        field_of(bytes(raw), TYPE, "model")


@pytest.mark.parametrize(("model", "status"), [("other", 200), ("third", 404), (None, 400)])
@within(20)
async def test_an_upload_reaches_the_engine_of_its_model(model: str | None, status: int) -> None:
    smol, other = FakeEngine("d0", "decode"), FakeEngine("d1", "decode", model="other", content=OTHER)
    async with fleet(smol, other) as router:
        upload = aiohttp.FormData()
        upload.add_field("file", b"RIFF", filename="a.wav", content_type="audio/wav")
        if model is not None:
            upload.add_field("model", model)
        url = router.published.http + "/v1/audio/transcriptions"
        async with router.client.post(url, data=upload) as reply:
            assert reply.status == status
            boundary = reply.request_info.headers["Content-Type"].partition("boundary=")[2]
        assert not smol.requests
        if status == 200:
            (got,) = other.requests
            assert got["raw"].startswith(f"--{boundary}\r\n".encode())
            assert b"RIFF" in got["raw"] and got["raw"].endswith(f"--{boundary}--\r\n".encode())
