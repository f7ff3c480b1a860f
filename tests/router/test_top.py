"""`pdx top`: one picture of a running router, in terminals of any width, and what it says when nobody answers."""

from __future__ import annotations

import asyncio
import io
import re
import shlex
from pathlib import Path

import msgspec
import pytest
from engine_fakes import KEY, MODEL, FakeEngine, fleet, within
from rich.console import Console

from pdx.commands import top
from pdx.commands.top_frame import frame
from pdx.commands.watched import Watched
from pdx.keys import admin_token
from pdx.router.live.values import DaemonRow, EngineRow, Live, RequestRow, Step
from pdx.verbs import DaemonView, DiskView

VIEW = DaemonView(
    arena_bytes=64 << 20, leased_bytes=16 << 20, cached_bytes=32 << 20, cached_blocks=9, pinned_bytes=0, waiting=0,
    handoffs_under_way=2, lookup_blocks=10, arena_hit_blocks=5, disk_hit_blocks=2, handoffs_failed=7,
    disk=DiskView(state="well", blocks=1, used_bytes=3 << 30, cap_bytes=9 << 30, waiting_writes=0, loaded_blocks=0,
                  written_blocks=0, io_errors=0),
)  # fmt: skip
STEPS = [
    Step("chosen", 100), Step("prefill_sent", 200, "P"), Step("prefill_answered", 500_000, "P"),
    Step("first_byte", 501_000), Step("decode_sent", 501_000, "D"), Step("decode_answered", 750_000, "D"),
    Step("finished", 1_000_000),
]  # fmt: skip


def request(serial: int, **changed: object) -> RequestRow:
    row = RequestRow(
        serial=serial, changed=serial, request_id=f"id-{serial}", path="/v1/completions", model="m",
        began_unix_s=1e9, way="seeded", code=200, prefill="P", decode="D", steps=STEPS,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changed)


def watched(*requests: RequestRow, **changed: object) -> Watched:
    engine = EngineRow(
        engine_id="P", role="prefill", model="m", url="http://x", daemon="d", health="ready", in_flight=3
    )
    daemons = [
        DaemonRow(daemon="dd", lanes=[], heard_s=0.1, view=VIEW),
        DaemonRow(daemon="silent", lanes=[], heard_s=1.0),
    ]
    live = Live(
        run="r", version="0", began_unix_s=0.0, now_unix_s=1e9 + 60, engines=[engine], daemons=daemons, requests=[],
        next=1, more=False, keeps=10, queued=0, reasons=[],
    )  # fmt: skip
    seen = Watched("http://127.0.0.1:1", "")
    seen.now = msgspec.structs.replace(live, **changed)
    seen.requests = {row.serial: row for row in requests}
    return seen


def drawn(seen: Watched, width: int = 140, height: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, height=height or 60, force_terminal=False)
    console.print(frame(seen, width=width, height=height))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_picture_says_who_is_there_and_where_the_time_went() -> None:
    text = drawn(watched(request(1), request(2, code=502, reason="decode_500"), request(3, code=0, steps=STEPS[:2])))
    for words in (
        "P",
        "prefill",
        "ready",
        "16 MiB",
        "32 MiB",
        "3.0 GiB",
        "50% + 20%",
        "id-1",
        "502 decode_500",
        "1000 ms",
    ):
        assert words in text, words
    assert text.index("id-3") < text.index("id-1"), "the newest first"
    assert "under way" in text
    bars = re.findall(r"█+", next(line for line in text.splitlines() if "id-1" in line))
    assert sum(map(len, bars)) == 28, "all of its time"


@pytest.mark.parametrize("width", [32, 40, 60, 80, 100, 200])
def test_it_fits_into_any_terminal(width: int) -> None:
    lines = drawn(watched(request(1, request_id="r" * 128)), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("ready" in line for line in lines)
    assert any("200" in line for line in lines)


def test_the_requests_get_the_lines_that_are_left() -> None:
    seen = watched(*(request(serial) for serial in range(50)))
    assert seen.now is not None
    for engines in (1, 200):
        seen.now = msgspec.structs.replace(seen.now, engines=seen.now.engines[:1] * engines)
        for height in (24, 40):
            assert height - 2 <= len(drawn(seen, height=height).splitlines()) <= height
    assert "engines, 3 of 200" in drawn(seen, height=24)
    assert "id-49" in drawn(seen, height=24)
    assert "id-9" not in drawn(seen, height=24)


def test_a_terminal_obeys_no_text_of_others() -> None:
    text = drawn(watched(request(1, request_id="a\x1b[2Jb\nc\r[red]d[/]", reason="\x1b]0;t\x07", code=503)))
    assert "\x1b" not in text
    assert "a·[2Jb·c·[red]d[/]" in text


@within(30)
async def test_one_picture_of_a_running_router(capsys: pytest.CaptureFixture[str]) -> None:
    """Every example of the help."""
    async with fleet(FakeEngine("P", "prefill"), FakeEngine("D", "decode"), admin_port=0) as router:
        await router.ask({"model": MODEL, "prompt": "x"})
        code = await asyncio.to_thread(top.main, ["--once", "--router", router.published.admin])
        shown = capsys.readouterr().out
        assert code == 0
        assert all(words in shown for words in ("P", "D", "d0", "200"))


@within(30)
async def test_it_knows_the_token_by_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pdx.key"
    file.write_bytes(KEY)
    file.chmod(0o600)
    async with fleet(admin_port=0, admin_token=admin_token(KEY)) as router:
        address = ["--once", "--router", router.published.admin]
        assert await asyncio.to_thread(top.main, address) == 2
        assert "token of the cluster key: name it by --key-file or PDX_KEY_FILE" in capsys.readouterr().err
        assert await asyncio.to_thread(top.main, [*address, "--key-file", str(file)]) == 0
        other = tmp_path / "other.key"
        other.write_bytes(b"another key than the router has")
        other.chmod(0o600)
        assert await asyncio.to_thread(top.main, [*address, "--key-file", str(other)]) == 2
        assert "that is not the token of the cluster key that this router has" in capsys.readouterr().err
    assert top.main(["--print-token", "--key-file", str(file)]) == 0
    assert admin_token(KEY) in capsys.readouterr().out


def test_what_can_not_be_shown_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--router", "http://127.0.0.1:1"], ["--router", "ftp://x"], ["--every-s", "0"], ["--print-token"]):
        assert top.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("pdx top: ")
        assert len(error.splitlines()) == 1


def test_examples_can_be_parsed() -> None:
    lines = [line.strip() for line in top.EXAMPLES.splitlines() if line.startswith("  pdx top")]
    for line in lines:
        words = shlex.split(line.split("   ")[0])
        assert vars(top._parser().parse_args(words[2:]))
    assert len(lines) == 4


@within(30)
async def test_what_is_new_is_added_and_a_new_router_begins_anew() -> None:
    async with fleet(FakeEngine("D", "decode"), admin_port=0) as router:
        seen = Watched(router.published.admin, "")
        for expected in (1, 2):
            await router.ask({"model": MODEL, "prompt": "x"})
            await asyncio.to_thread(seen.look)
            assert len(seen.requests) == expected
        assert seen.now is not None
        seen.now = msgspec.structs.replace(seen.now, run="earlier")
        await asyncio.to_thread(seen.look)
        assert (len(seen.requests), seen.began_anew) == (2, 1)
