"""A router's admin port over two real daemons: what each has, and verbs that reach both."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fleet import BareEngine, Fleet, fleet_in, until
from tokenizer import tokenizer, tokens_of

from pdx.admin import ClearRequest, LookupRequest, PinRequest, Report, UnpinRequest
from pdx.chain import block_hashes
from pdx.commands import kv
from pdx.errors import DaemonGone, Refused
from pdx.keys import admin_token, tenant_of
from pdx.kv import RouterKv
from pdx.verbs import Cleared, Found, Pinned, Unpinned

ALGORITHM = "sha256_cbor/vllm-none-hash"
TEXT = "The manual begins with a page on safety, which nobody reads before the first accident."
TOKENS = tokens_of({"prompt": TEXT})
WHOLE = len(TOKENS) // 16


@dataclass
class Cluster:
    fleet: Fleet
    engines: list[BareEngine]
    admin: str
    client: RouterKv

    def keep(self, engine: BareEngine, tokens: list[int], salt: str = "") -> None:
        hashes = block_hashes(engine.info.content, tokens, salt=salt)
        engine.keep(hashes, tenant_of(salt))
        until(lambda: engine.look_up(hashes, tenant_of(salt)) == len(hashes), "they are there")

    def hits(self, salt: str = "") -> list[int]:
        hashes = [block_hashes(engine.info.content, TOKENS, salt=salt) for engine in self.engines]
        return [engine.look_up(h, tenant_of(salt)) for engine, h in zip(self.engines, hashes, strict=True)]

    def told(self, report: Report) -> dict[str, object]:
        """The one result of each daemon, by the name of its engine."""
        assert not report.errors
        by_daemon = {each.daemon: each.results for each in report.daemons}
        return {engine.name: by_daemon[engine.daemon.ref.daemon_id][0] for engine in self.engines}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with tokenizer() as url, fleet_in(tmp_path) as fleet:
        file = tmp_path / "router.json"
        flags = ["--port", "0", "--control", "tcp://127.0.0.1:0", "--admin-port", "0", "--publish", str(file)]
        router = subprocess.Popen([sys.executable, "-m", "pdx.router.main", *flags, "--key-file", str(fleet.key_file)])
        try:
            until(file.exists, "the router listens")
            where = json.loads(file.read_bytes())
            engines = []
            for name in "AB":
                daemon = fleet.daemon(disk=str(tmp_path / name), disk_cap="64MiB", pin_share="0.5")
                engines.append(fleet.engine(daemon, name, algorithm=ALGORITHM, url=url, router=where["control"]))
            client = RouterKv(where["admin"], token=admin_token(fleet.key_file.read_bytes()))
            until(lambda: len(client.ask("health").daemons) == 2, "both have announced themselves")
            yield Cluster(fleet, engines, where["admin"], client)
        finally:
            router.terminate()
            assert router.wait(10) == 0


def test_lookup_says_who_has_what(cluster: Cluster) -> None:
    first, second = cluster.engines
    cluster.keep(first, TOKENS)
    cluster.keep(second, TOKENS[:32])
    report = cluster.client.lookup(LookupRequest(text=TEXT))
    assert (report.model, report.prompt_tokens) == ("m", len(TOKENS))
    found = cluster.told(report)
    assert {name: each.blocks for name, each in found.items() if isinstance(each, Found)} == {"A": WHOLE, "B": 2}
    assert cluster.hits() == [WHOLE, 2]
    again = cluster.told(cluster.client.lookup(LookupRequest(tokens=TOKENS, model="m", cache_salt="alice")))
    assert [each.blocks for each in again.values() if isinstance(each, Found)] == [0, 0]


def test_pin_unpin_and_clear_reach_all(cluster: Cluster) -> None:
    for engine in cluster.engines:
        cluster.keep(engine, TOKENS)
    pinned = cluster.told(cluster.client.pin(PinRequest(name="manual", text=TEXT, ttl_s=60.0)))
    assert [each.blocks for each in pinned.values() if isinstance(each, Pinned)] == [WHOLE] * 2
    for expected in (WHOLE, 0):
        ended = cluster.told(cluster.client.unpin(UnpinRequest(name="manual")))
        assert list(ended.values()) == [Unpinned(name="manual", blocks=expected)] * 2
    for request, expected in (
        (ClearRequest(text=TEXT, dry_run=True), WHOLE),
        (ClearRequest(text=TEXT, cache_salt="alice"), 0),
        (ClearRequest(text=TEXT, tier="arena"), WHOLE),
        (ClearRequest(model="m", tier="arena"), 0),
    ):
        cleared = cluster.told(cluster.client.clear(request))
        assert [each.arena.blocks for each in cleared.values() if isinstance(each, Cleared)] == [expected] * 2
    until(lambda: all(e.daemon.stats()["disk"]["written"] == WHOLE for e in cluster.engines), "all was on disk before")
    assert cluster.hits() == [WHOLE] * 2, "from disk"
    cluster.client.clear(ClearRequest(everything=True))
    assert cluster.hits() == [0, 0]


def test_a_daemon_that_does_not_answer_is_told_beside_those_that_do(cluster: Cluster) -> None:
    first, second = cluster.engines
    cluster.keep(first, TOKENS)
    second.daemon.process.send_signal(signal.SIGSTOP)
    report = cluster.client.clear(ClearRequest(everything=True))
    answers = {each.daemon: each for each in report.daemons}
    assert answers[first.daemon.ref.daemon_id].results
    assert "did not answer within 5 s" in answers[second.daemon.ref.daemon_id].error
    # By now it is one that the router has not heard for long: it is told all the same, in every report.
    for again in (cluster.client.clear(ClearRequest(everything=True)), cluster.client.ask("stats")):
        errors = {each.daemon: each.error for each in again.daemons}
        assert "fallen silent" in errors[second.daemon.ref.daemon_id]
    assert len(report.errors) == 1
    assert first.look_up(block_hashes(first.info.content, TOKENS)) == 0


def test_what_a_model_does_not_have_is_refused(cluster: Cluster) -> None:
    for request in (ClearRequest(model="adapter"), ClearRequest(text="x", model="adapter")):
        with pytest.raises(Refused, match="not 'adapter'; there are m"):
            cluster.client.clear(request)


def test_without_the_token_nothing_is_said(cluster: Cluster) -> None:
    for token in ("", "x", admin_token(b"another key")):
        with pytest.raises(Refused, match="token of the cluster key"):
            RouterKv(cluster.admin, token=token).ask("stats")
    with pytest.raises(DaemonGone):
        RouterKv("http://127.0.0.1:1").ask("stats")


@pytest.mark.parametrize("example", [line.strip() for line in kv.EXAMPLES.splitlines() if "--admin" in line])
def test_examples_with_a_router(cluster: Cluster, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = example.split("   ")[0].replace("http://127.0.0.1:8001", cluster.admin)
    key = ["--key-file", str(cluster.fleet.key_file)]
    assert kv.main([*shlex.split(command)[2:], *key]) == 0
    out = capsys.readouterr().out
    assert all(engine.daemon.ref.daemon_id in out for engine in cluster.engines)


def test_example_with_curl(cluster: Cluster) -> None:
    """The manual's, without curl: the same method, headers and body."""
    manual = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    line = next(line for line in manual.splitlines() if line.startswith("curl") and "/admin/kv/" in line)
    token = admin_token(cluster.fleet.key_file.read_bytes())
    words = shlex.split(line.replace("http://127.0.0.1:8001", cluster.admin).replace("$TOKEN", token))
    url = next(word for word in words if word.startswith("http"))
    headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
    request = urllib.request.Request(url, data=words[words.index("-d") + 1].encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert len(json.loads(answer.read())["daemons"]) == 2
