"""Which daemon an engine joins, by what the two were told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import msgspec
import pytest

from pdx import joining
from pdx.config import FLAGS_NAME, INFO_NAME, Config, flags_of
from pdx.errors import ConfigError
from pdx.wire import DaemonRef, LaneOffer

TCP = DaemonRef(daemon_id="d", incarnation=1, control="tcp://127.0.0.1:1", lanes=[LaneOffer(endpoint="tcp://h:1")])
TLS_NAMES = ("tls_cert", "tls_key", "tls_ca")


def files(folder: Path, *names: str, content: str = "") -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(content or f"{folder} {name}")
    return {name: str(folder / name) for name in names}


def started(run_dir: Path, **settings: str) -> None:
    """A daemon runs there, as these settings say."""
    config = Config(run_dir=str(run_dir), **settings)  # type: ignore[arg-type]
    (run_dir / FLAGS_NAME).write_text(json.dumps(flags_of(config)))
    (run_dir / INFO_NAME).write_text(json.dumps({"pid": 4711}))


def check(run_dir: Path, **settings: str) -> None:
    joining.check(Config(run_dir=str(run_dir), **settings), TCP)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tls", "key_file", "host"])
def test_what_security_asks_for_and_the_daemon_lacks_is_refused(tmp_path: Path, name: str) -> None:
    asked = {
        "tls": files(tmp_path / "asked", *TLS_NAMES),
        "key_file": files(tmp_path / "asked", "key_file"),
        "host": {"host": "10.0.0.9"},
    }[name]
    started(tmp_path)
    with pytest.raises(ConfigError, match=rf"without {next(iter(asked))} .*end it \(kill 4711\)"):
        check(tmp_path, **asked)
    started(tmp_path, **asked)
    check(tmp_path, **asked)


def test_who_says_nothing_joins_whatever_there_is(tmp_path: Path) -> None:
    started(tmp_path, host="10.0.0.9", **files(tmp_path / "theirs", *TLS_NAMES, "key_file"))
    check(tmp_path)


def test_another_file_is_another_key_unless_it_holds_the_same(tmp_path: Path) -> None:
    started(tmp_path, **files(tmp_path / "theirs", "key_file", content="k" * 32))
    check(tmp_path, **files(tmp_path / "linked", "key_file", content="k" * 32))
    with pytest.raises(ConfigError, match=f"it has key_file {tmp_path}/theirs/key_file"):
        check(tmp_path, **files(tmp_path / "other", "key_file", content="o" * 32))
    with pytest.raises(ConfigError):
        check(tmp_path, key_file=str(tmp_path / "absent"))


def test_the_key_of_a_daemon_that_was_given_none_can_be_named(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / "cluster.key").write_text("k" * 32)
    check(tmp_path, key_file=str(tmp_path / "cluster.key"))


def test_a_daemon_that_does_not_say_how_it_was_started_proves_nothing(tmp_path: Path) -> None:
    check(tmp_path)
    with pytest.raises(ConfigError, match=r"without host 10\.0\.0\.9: it has host none; end it, and"):
        check(tmp_path, host="10.0.0.9")


def test_other_settings_are_told_and_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config(run_dir=str(tmp_path), arena="16MiB")
    started(tmp_path, **files(tmp_path / "theirs", "key_file", content="k" * 32))
    same = msgspec.structs.replace(config, **files(tmp_path / "linked", "key_file", content="k" * 32))
    with caplog.at_level(logging.WARNING):
        joining.check(same, TCP)
        joining.warn(same)
    (told,) = caplog.messages
    assert "was started without --arena=16MiB, which" in told
