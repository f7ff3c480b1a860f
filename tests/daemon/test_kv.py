"""`pdx kv` and the Python client on a real daemon: every example of the help, refusals, and restarts with a disk."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from fleet import BareEngine, Daemon, Fleet, fleet_in, until
from http_server import serving
from tokenizer import tokenizer, tokens_of

from pdx.admin import ClearRequest, LookupRequest, PinRequest, Report, UnpinRequest
from pdx.chain import block_hashes
from pdx.commands import kv
from pdx.commands.kv_table import as_table
from pdx.errors import Refused
from pdx.keys import tenant_of
from pdx.kv import LocalKv, bearer, post
from pdx.verbs import Cleared, Found, Pinned, Unpinned

ALGORITHM = "sha256_cbor/vllm-none-hash"
TEXT = "The manual begins with a page on safety, which nobody reads before the first accident."
CHAT = [{"role": "user", "content": TEXT}]
EXAMPLES = [line.strip() for line in kv.EXAMPLES.splitlines() if line.startswith("  pdx kv ")]


@dataclass
class Host:
    fleet: Fleet
    daemon: Daemon
    engine: BareEngine
    folder: Path

    def keep(self, tokens: list[int], salt: str = "") -> int:
        """How many blocks."""
        hashes = block_hashes(self.engine.info.content, tokens, salt=salt)
        self.engine.keep(hashes, tenant_of(salt))
        until(lambda: self.hits(tokens, salt) == len(hashes), "they are there")
        return len(hashes)

    def hits(self, tokens: list[int], salt: str = "") -> int:
        return self.engine.look_up(block_hashes(self.engine.info.content, tokens, salt=salt), tenant_of(salt))

    def command(self, *words: str) -> int:
        return kv.main([*words, "--run-dir", str(self.daemon.run_dir)])


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with tokenizer() as url, fleet_in(tmp_path) as fleet:
        daemon = fleet.daemon(disk=str(tmp_path / "disk"), disk_cap="64MiB", pin_share="0.5")
        yield Host(fleet, daemon, fleet.engine(daemon, "E", algorithm=ALGORITHM, url=url), tmp_path)


@pytest.fixture
def client(host: Host) -> Iterator[LocalKv]:
    with LocalKv.open(host.daemon.config) as client:
        yield client


def only(report: Report) -> object:
    (daemon,) = report.daemons
    assert not daemon.error
    (result,) = daemon.results
    return result


def test_every_way_to_say_a_prompt_finds_the_same(host: Host, client: LocalKv) -> None:
    blocks = host.keep(tokens_of({"prompt": TEXT}))
    chat_blocks = host.keep(tokens_of({"messages": CHAT}))
    for request, expected in (
        (LookupRequest(text=TEXT), blocks),
        (LookupRequest(tokens=tokens_of({"prompt": TEXT}), model="m"), blocks),
        (LookupRequest(messages=CHAT), chat_blocks),
        (LookupRequest(text=TEXT, cache_salt="alice"), 0),
        (LookupRequest(text="x" * 100), 0),
    ):
        found = only(client.lookup(request))
        assert isinstance(found, Found)
        assert (found.blocks, found.arena_blocks, found.tokens) == (expected, expected, expected * 16)
    report = client.lookup(LookupRequest(text=TEXT))
    assert (report.model, report.prompt_tokens) == ("m", len(TEXT))


@pytest.mark.parametrize("example", [line for line in EXAMPLES if "--admin" not in line])
def test_examples_of_the_help(
    host: Host, example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(host.folder)
    Path("chat.json").write_text(json.dumps(CHAT))
    host.keep(tokens_of({"prompt": "The manual begins"}))
    words = shlex.split(example.split("   ")[0].replace("/run/pdx", str(host.daemon.run_dir)))
    assert host.command(*words[2:]) == 0
    out, err = capsys.readouterr()
    assert out and not err
    assert host.daemon.ref.daemon_id in out


def test_commands_say_what_they_did(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = host.keep(tokens_of({"prompt": TEXT}))
    host.command("lookup", "--text", TEXT)
    assert f"{blocks * 16} tokens in {blocks} blocks: {blocks} in memory, 0 on disk only" in capsys.readouterr().out
    host.command("pin", "manual", "--text", TEXT, "--ttl-s", "60")
    assert f"manual: {blocks} blocks pinned for 60 s" in capsys.readouterr().out
    host.command("stats", "--format", "json")
    (report,) = json.loads(capsys.readouterr().out)["daemons"]
    assert [pin["name"] for pin in report["body"]["pinned"]["pins"]] == ["manual"]
    host.command("clear", "--everything", "--format", "json")
    (report,) = json.loads(capsys.readouterr().out)["daemons"]
    (cleared,) = report["results"]
    assert (cleared["arena"]["blocks"], cleared["arena"]["held"], cleared["pins_ended"]) == (blocks, blocks, 1)
    host.command("unpin", "manual")
    assert "0 blocks unpinned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["lookup"], "one of tokens, text and messages"),
        (["lookup", "--text", "x", "--model", "adapter"], "not 'adapter'; there are m"),
        (["lookup", "--tokens", "1,x"], "can't be read"),
        (["lookup", "--tokens=-1"], "a token is a number"),
        (["lookup", "--chat", "no-such-file"], "No such file"),
        (["pin", "x" * 200, "--text", "x"], "length <= 128"),
        (["pin", "x", "--text", "x", "--ttl-s", "0"], "> 0"),
        (["clear"], "say which blocks"),
        (["clear", "--everything", "--salt", "a"], "say which blocks"),
        (["clear", "--everything", "--text", "hi"], "or that everything is meant, not both"),
        (["clear", "--everything", "--older-s", "10"], "or that everything is meant, not both"),
        (["stats", "--router", "ftp://x"], "not an http url"),
        (["stats", "--router", "http://127.0.0.1:1"], "does not answer"),
    ],
)
def test_refusals_are_one_line(
    host: Host, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host.command(*words) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("pdx kv: ") and complaint in line


def test_health_names_the_process(host: Host, client: LocalKv) -> None:
    (report,) = client.ask("health").daemons
    assert report.body["pid"] == host.daemon.process.pid


def test_a_router_that_knows_no_daemon_is_told_in_words() -> None:
    assert as_table(Report(daemons=[])) == "no daemon has announced an engine"


def listening(answer: Callable[[BaseHTTPRequestHandler], None]) -> AbstractContextManager[str]:
    """The URL of a server whose every answer this writes."""
    return serving(type("Handler", (BaseHTTPRequestHandler,), {"do_GET": answer, "do_POST": answer}))


@pytest.mark.parametrize("body", [None, b"{}"])
def test_tokens_and_prompts_go_to_no_proxy_and_nowhere_else(
    body: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, str | None]] = []

    def answer(request: BaseHTTPRequestHandler, name: str, code: int, **headers: str) -> None:
        heard.append((name, request.headers["Authorization"]))
        request.send_response(code)
        for header, value in {"Content-Length": "0", **headers}.items():
            request.send_header(header, value)
        request.end_headers()

    with listening(lambda request: answer(request, "other", 200)) as other:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", other)
        with listening(lambda request: answer(request, "named", 302, Location=f"{other}/x")) as named:
            with pytest.raises(Refused, match="HTTP 302, which sends us to"):
                post(f"{named}/admin/kv/stats", body, bearer("t0ken"))
    assert heard == [("named", "Bearer t0ken")]


def test_images_are_refused_by_name(client: LocalKv) -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    with pytest.raises(Refused, match="images and audio"):
        client.lookup(LookupRequest(messages=[picture]))


def test_names_that_can_not_be_told_from_tokens_are_refused(host: Host) -> None:
    host.fleet.engine(host.daemon, "F", model="pickled", algorithm="sha256/x")
    with LocalKv.open(host.daemon.config) as client, pytest.raises(Refused, match="--prefix-caching-hash-algo"):
        client.lookup(LookupRequest(tokens=[1] * 16, model="pickled"))


def test_one_tenant_neither_finds_nor_steers_what_is_anothers(host: Host, client: LocalKv) -> None:
    tokens = list(range(64))
    for salt in ("", "alice"):
        assert host.keep(tokens, salt) == 4
    only(client.pin(PinRequest(name="p", tokens=tokens, cache_salt="alice")))
    for request in (UnpinRequest(name="p"), UnpinRequest(name="p", cache_salt="bob")):
        assert only(client.unpin(request)) == Unpinned(name="p", blocks=0)
    cleared = only(client.clear(ClearRequest(tokens=tokens, cache_salt="bob")))
    assert isinstance(cleared, Cleared) and cleared.arena.blocks == cleared.disk.blocks == 0
    cleared = only(client.clear(ClearRequest(cache_salt="")))
    assert isinstance(cleared, Cleared) and cleared.arena.blocks == 4
    assert (host.hits(tokens), host.hits(tokens, "alice")) == (0, 4)
    assert only(client.unpin(UnpinRequest(name="p", cache_salt="alice"))) == Unpinned(name="p", blocks=4)


def test_what_was_cleared_is_not_served_by_the_next_daemon_either(host: Host, client: LocalKv) -> None:
    cleared, left = list(range(64)), list(range(1000, 1064))
    for tokens in (cleared, left):
        host.keep(tokens)
    until(lambda: host.daemon.stats()["disk"]["written"] == 8, "all is on disk")
    result = only(client.clear(ClearRequest(tokens=cleared)))
    assert isinstance(result, Cleared) and result.disk.blocks == 4
    repeated = ClearRequest(tokens=cleared)
    until(lambda: not only(client.clear(repeated)).disk.leaving, "its files are gone")  # type: ignore[attr-defined]
    host.daemon.kill()
    successor = host.fleet.daemon_in(host.folder / "again", disk=host.daemon.config.disk, disk_cap="64MiB")
    again = Host(host.fleet, successor, host.fleet.engine(successor, "E", algorithm=ALGORITHM), host.folder)
    assert (again.hits(cleared), again.hits(left)) == (0, 4)
    with LocalKv.open(successor.config) as other:
        found = only(other.lookup(LookupRequest(tokens=left)))
        assert isinstance(found, Found) and found.blocks == 4
        pinned = only(other.pin(PinRequest(name="p", tokens=left)))
        assert isinstance(pinned, Pinned) and pinned.blocks == 4
    successor.check()
