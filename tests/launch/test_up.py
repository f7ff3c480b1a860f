"""`pdx up` with a real router, real daemons and engines that compute nothing: what it tells works as it stands."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from daemon.fleet import until
from programs import pdx, read_until

from pdx import cli
from pdx.config import INFO_NAME, load
from pdx.errors import DaemonGone
from pdx.kv import LocalKv

WAIT_S = 30.0
FLAGS = ("--port", "0", "--arena", "4MiB", "--no-pin")


def test_what_it_says_can_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fleet.json"
    with pdx("up", "m", "--daemons", "2", "--admin-port", "0", "--publish", str(file), *FLAGS) as process:
        said = [line.partition(": ")[2] for line in read_until(process, "pdx: watch:")]
        commands = [shlex.split(line)[2:] for line in said if line.startswith(("keeps:", "watch:"))]
        assert [words[0] for words in commands] == ["kv", "kv", "top"]
        for words in commands:
            assert cli.main([*words, *(["--once"] if words[0] == "top" else [])]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out
        assert "prefill-0" in shown and "decode-0" in shown
        told = json.loads(file.read_text())
        assert {told["admin"], told["key_file"], *told["run_dirs"]} <= {word for words in commands for word in words}
        assert cli.main(["kv", "stats", "--admin", told["admin"], "--key-file", told["key_file"]]) == 0
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, out
    assert out.splitlines()[-1] == "pdx: stopped 5 processes, 0 left"


def test_a_daemon_that_is_killed_is_started_anew_and_later_the_next_time(tmp_path: Path) -> None:
    file = tmp_path / "fleet.json"
    with pdx("up", "m", "--publish", str(file), *FLAGS) as process:
        read_until(process, "pdx: watch:")
        (run_dir,) = map(Path, json.loads(file.read_text())["run_dirs"])
        kill_daemon(run_dir)
        read_until(process, "pdxd-a ended with exit code 137; it is started anew, empty")
        until(lambda: engines_in(run_dir) == {"prefill-0", "decode-0"}, "the engines attach to the next")
        kill_daemon(run_dir)
        read_until(process, "pdxd-a ended with exit code 137; it is started anew in 1 s, empty")
        until(lambda: engines_in(run_dir) == {"prefill-0", "decode-0"}, "the engines attach to that one")
        log = (run_dir.parent / "logs" / "pdxd-a.log").read_text()
        assert log.count("serving: arena 4 MiB") == 3, "all lives are told"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, out
    assert not file.exists(), "it would tell of what is no more"


def test_what_an_earlier_run_has_published_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    file = tmp_path / "fleet.json"
    file.write_text("{}")
    with pdx("up", "m", "--publish", str(file), "--no-such-flag", *FLAGS) as process:
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1, out
    assert not file.exists()
    logs = Path(out.splitlines()[-1].removeprefix("pdx: logs are in "))
    shutil.rmtree(logs.parent)


def kill_daemon(run_dir: Path) -> None:
    os.kill(json.loads((run_dir / INFO_NAME).read_text())["pid"], signal.SIGKILL)


def engines_in(run_dir: Path) -> set[str]:
    try:
        with LocalKv.open(load({"run_dir": str(run_dir)}, environ={})) as kv:
            (report,) = kv.ask("stats").daemons
    except DaemonGone:
        return set()
    return set(report.body["engines"])
