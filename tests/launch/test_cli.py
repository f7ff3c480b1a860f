"""The verbs of `pdx`: help, unknown ones, and the small ones in whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdx import __version__, cli
from pdx.commands import bench, kv
from pdx.launch.publish import publish


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sevre"]) == 2
    assert capsys.readouterr().err.startswith("pdx: no verb 'sevre'; there are serve, up")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"pdx {__version__}\n"


def test_bench_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert "  model " in capsys.readouterr().out
    assert bench.main(["nothing"]) == 2


def test_kv_starts_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kv.main(["stats", "--run-dir", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("pdx kv: no daemon runs in")
    assert not (tmp_path / "absent").exists()


def test_publish_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "at.json"
    for value in ({"a": 1}, {"a": 2}):
        publish(target, value)
        assert json.loads(target.read_text()) == value
    assert [path.name for path in tmp_path.iterdir()] == ["at.json"]
