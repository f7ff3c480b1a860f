"""The verbs of `pdx`: help, unknown ones, and the small ones in whole."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_tables import ROOT

from pdx import __version__, cli
from pdx.commands import bench, drain, kv, top
from pdx.daemon import main as daemon
from pdx.errors import ConfigError
from pdx.launch.publish import publish
from pdx.router import main as router
from pdx.whole import check_place
from pdx.wire import WIRE_VERSION


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sevre"]) == 2
    assert capsys.readouterr().err.startswith("pdx: no verb 'sevre'; there are serve, up")


def test_all_programs_tell_the_same_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    for program in (daemon.main, router.main):
        with pytest.raises(SystemExit) as ended:
            program(["--version"])
        assert ended.value.code == 0
    assert capsys.readouterr().out == f"pdx {__version__}, wire {WIRE_VERSION}\n" * 3


def test_bench_lists_what_can_be_run_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if line.startswith("  ")]
    names = [name for name in listed if name != "pdx"]
    assert {"transport", "handoff"} <= set(names)
    assert not {"demo", "model", "tiny", "prove", "timeline", "harness"} & set(names)
    for name in names:
        files = [ROOT / "benchmarks" / f"{name}.py", ROOT / "benchmarks" / name / "__main__.py"]
        assert any(f'prog="pdx bench {name}"' in file.read_text() for file in files if file.exists()), name
    for name in ("nothing", "timeline"):
        assert bench.main([name]) == 2


def test_kv_starts_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kv.main(["stats", "--run-dir", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("pdx kv: no daemon runs in")
    assert not (tmp_path / "absent").exists()


@pytest.fixture
def no_http() -> Iterator[str]:
    """What answers as a router's control port does: with ZeroMQ's greeting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f\3\n")

        thread = threading.Thread(target=greet)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_who_asks_the_wrong_port_is_told_in_one_line(no_http: str, capsys: pytest.CaptureFixture[str]) -> None:
    for url, said in (
        (no_http, "does not answer as an admin port does, which pdx-router --admin-port opens"),
        ("http://127.0.0.1:80o1", "is not an http url"),
        ("tcp://127.0.0.1:5700", "operators use its --admin-port"),
        ("http://[::1", "is not an http url"),
    ):
        assert kv.main(["stats", "--admin", url]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


def test_what_no_text_is_made_of_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes on the command line come as halves of characters."""
    (tmp_path / "deep.json").write_text("[" * 100_000)
    admin = ("--admin", "http://127.0.0.1:9")
    for command, words, said in (
        (kv, ["unpin", "\udcff"], r"'\udcff' is not UTF-8"),
        (kv, ["lookup", "--text", "a", "--salt", "\udcff"], r"'\udcff' is not UTF-8"),
        (drain, ["\udcff"], r"'\udcff' is not UTF-8"),
        (kv, ["lookup", "--chat", str(tmp_path / "deep.json")], "the prompt can't be read: maximum recursion depth"),
    ):
        assert command.main([*words, *admin]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


def test_where_an_admin_port_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PDX_ADMIN", "ftp://variable")
    for command, words in ((kv, ["stats"]), (top, ["--once"]), (drain, [])):
        for flags, asked in (([], "variable"), (["--admin", "ftp://flag"], "flag"), (["--router", "ftp://old"], "old")):
            assert command.main([*words, *flags]) == 2
            assert f": ftp://{asked}/admin/" in capsys.readouterr().err
    assert kv.main(["stats", "--run-dir", str(tmp_path / "absent")]) == 2
    assert "no daemon runs in" in capsys.readouterr().err


def test_draining_nobody_in_particular_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--wait-s", "1"], ["", "--wait-secs", "1"], ["--undo"]):
        assert drain.main([*words, "--admin", "http://127.0.0.1:9"]) == 2
        assert "say whom" in capsys.readouterr().err


def test_publish_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "at.json"
    for value in ({"a": 1}, {"a": 2}):
        publish(target, value, say=pytest.fail)
        assert json.loads(target.read_text()) == value
    assert [path.name for path in tmp_path.iterdir()] == ["at.json"]


def test_what_can_not_be_published_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    publish(tmp_path / "at.json", {"a": 1}, say=said.append)
    assert said == [f"nothing is published in {tmp_path / 'at.json'}: No space left on device"]
    assert not list(tmp_path.iterdir())


def test_publish_follows_links_and_replaces_files_only(tmp_path: Path) -> None:
    target, link, pipe = (tmp_path / name for name in ("at.json", "link", "pipe"))
    target.write_text("{}")
    link.symlink_to(target)
    check_place(link, flag="--publish")
    publish(link, {"a": 1}, say=pytest.fail)
    assert json.loads(target.read_text()) == {"a": 1}
    assert link.is_symlink()
    os.mkfifo(pipe)
    for other in (pipe, Path("/dev/null")):
        with pytest.raises(ConfigError, match=f"--publish {other}: that is no regular file"):
            check_place(other, flag="--publish")
