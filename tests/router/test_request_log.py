"""The request log: a line of each request, whole, without a prompt or a key, in whatever file has the name now."""

from __future__ import annotations

import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from engine_fakes import FakeEngine, fleet, until, within

from pdx.errors import ConfigError
from pdx.router import request_log
from pdx.router.front.access import ApiKeys, Caller
from pdx.router.request_log import RequestLine, RequestLog, refused_line

KEY = "sk-" + "k" * 20
PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def some(number: int) -> RequestLine:
    return refused_line(request_id=f"id-{number}", path="/v1/completions", code=400, reason="model")


@within(20)
async def test_each_request_is_a_line(tmp_path: Path) -> None:
    file, bearer = tmp_path / "requests.log", {"Authorization": f"Bearer {KEY}"}
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    async with fleet(p, d, request_log=str(file), keys=ApiKeys({KEY: Caller("alice")})) as router:
        assert (await router.ask(PROMPT, headers={**bearer, "X-Request-Id": "mine-1"}))[0] == 200
        async with router.post("/v1/completions", {**PROMPT, "n": 2, "stream": True}, headers=bearer) as reply:
            await reply.read()
        assert (await router.ask(PROMPT, headers={"X-Request-Id": "mine-2"}))[0] == 401
        assert (await router.ask({**PROMPT, "model": "x"}, headers=bearer))[0] == 404
        d.fault = p.fault = "501"
        assert (await router.ask(PROMPT, headers=bearer))[0] == 501
        async with router.get("/health") as reply:
            assert reply.status == 200
    pair, alone, no_key, no_model, failed = lines(file)
    assert 0 < pair.pop("ttft_s") <= pair.pop("duration_s")
    assert datetime.fromisoformat(pair.pop("time")).tzinfo is not None
    assert pair == {
        "id": "mine-1", "path": "/v1/completions", "model": "smol", "way": "after", "reason": "", "handoff": "ok",
        "prefill": "p0", "decode": "d0", "code": 200, "prompt_tokens": 4, "cached_tokens": 2,
    }  # fmt: skip
    assert (alone["way"], alone["decode"], alone["handoff"], alone["prompt_tokens"]) == ("alone", "d0", "", None)
    assert alone["reason"]
    assert (no_key["id"], no_key["code"], no_key["reason"], no_key["ttft_s"]) == ("mine-2", 401, "key", None)
    assert (no_model["code"], no_model["reason"]) == (404, "model")
    assert (failed["code"], failed["prefill"]) == (501, "p0")
    text = file.read_text()
    assert KEY not in text
    assert "Once upon" not in text


@within(20)
async def test_a_file_that_is_moved_away_is_followed_by_another(tmp_path: Path) -> None:
    file, old = tmp_path / "log", tmp_path / "log.1"
    log = RequestLog(str(file))
    try:
        log.add(some(1))
        await until(lambda: file.stat().st_size > 0, "it is written")
        file.rename(old)
        log.add(some(2))
        await until(lambda: file.exists() and file.stat().st_size > 0, "the next one as well")
    finally:
        log.close()
    assert [line["id"] for each in (old, file) for line in lines(each)] == ["id-1", "id-2"]


def test_workers_append_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "log"
    logs = [RequestLog(str(file)) for _ in range(3)]

    def worker(log: RequestLog, first: int) -> None:
        for number in range(first, first + 2000):
            log.add(some(number))
        log.close()

    threads = [threading.Thread(target=worker, args=(log, 2000 * n)) for n, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {line["id"] for line in lines(file)} == {f"id-{number}" for number in range(6000)}


def test_what_cannot_be_written_in_time_is_lost_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_log, "FLUSH_S", 60.0)
    monkeypatch.setattr(request_log, "LINES_MAX", 10)
    log = RequestLog(str(tmp_path / "log"))
    for number in range(100):
        log.add(some(number))
    log.close()
    assert [line["id"] for line in lines(tmp_path / "log")] == [f"id-{number}" for number in range(10)]
    assert caplog.text.count("are lost") == 1


def test_a_full_disk_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog("/dev/full")
    log.add(some(1))
    log.close()
    assert "lines of the request log /dev/full are lost: No space left on device" in caplog.text


def test_any_path_can_be_written() -> None:
    line = refused_line(request_id="", path="/v1/\udce9" + "x" * 1000, code=404, reason="path")
    assert len(line.path.encode()) == request_log.PATH_CHARS_MAX


@pytest.mark.parametrize(("place", "why"), [("nowhere/log", "No such file"), ("", "Is a directory")])
def test_a_place_that_is_none_is_refused(place: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"can't write --request-log .*: {why}"):
        RequestLog(str(tmp_path / place))


def test_a_line_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    log = RequestLog("-")
    log.add(some(1))
    log.close()
    assert json.loads(capfd.readouterr().out)["id"] == "id-1"
