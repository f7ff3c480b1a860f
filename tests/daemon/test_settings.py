"""What daemons and engines are told: by flags, variables and files, and what is said of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from pdx.config import KEY_NAME, Config, add_flag, chooser_of, cluster_key, default_run_dir, ensure_run_dir, load
from pdx.daemon.main import main
from pdx.errors import ConfigError


def test_unknown_variables_and_keys_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'arean', did you mean 'arena'"):
        load({}, environ={"PDX_AREAN": "1GiB"})
    (tmp_path / "c.yaml").write_text("chunk_token: 5")
    with pytest.raises(ConfigError, match="did you mean 'chunk_tokens'"):
        load({}, environ={}, yaml_file=str(tmp_path / "c.yaml"))


def test_a_value_of_another_kind_is_an_error_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lease_s: soon\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: lease_s: 'soon': expected `float`"):
        load({}, environ={}, yaml_file=str(tmp_path / "c.yaml"))
    with pytest.raises(ConfigError, match="environment: control_port: 'x': expected `int`"):
        load({}, environ={"PDX_CONTROL_PORT": "x"})


def test_a_file_of_settings_is_named_by_a_flag_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("arena: lots\n")
    assert main(["--config", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("pdxd: arena: 'lots' is not a size")


def test_the_help_has_every_setting_and_the_defaults_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in set(Config.__struct_fields__) - {"budgets"}:
        assert f"--{name.replace('_', '-')} " in said or f"PDX_{name.upper()} " in said
    for told in ("last engine has left (default: 60)", "one cache_salt may take (default: 1)", "(default: 1GiB)"):
        assert told in said


@pytest.mark.parametrize("key", ["arena", "extent", "disk_cap"])
def test_a_small_number_without_a_unit_is_taken_for_a_slip(key: str) -> None:
    for text in ("16", "512 "):
        with pytest.raises(ConfigError, match=f"{key}: {text} would be bytes: .*, as in {text.strip()}MiB"):
            load({key: text}, environ={})
    for text in ("1048576", "64KiB", "65536B"):
        load({"arena": "4MiB", "extent": "8KiB", key: text}, environ={})


def test_an_empty_variable_says_nothing(tmp_path: Path) -> None:
    """As a container's manifest has it whose value is not set: what a file says of the key must hold."""
    (tmp_path / "c.yaml").write_text("key_file: /k\n")
    empty = {"PDX_KEY_FILE": "", "PDX_LEASE_S": ""}
    config = load({}, environ=empty, yaml_file=str(tmp_path / "c.yaml"))
    assert (config.key_file, config.lease_s) == ("/k", Config().lease_s)
    assert load({"key_file": ""}, environ=empty, yaml_file=str(tmp_path / "c.yaml")).key_file == ""


@pytest.mark.parametrize(
    ("kind", "complaint"), [("pipe", "no regular file"), ("device", "no regular file"), ("large", "more than 65536 b")]
)
def test_what_can_be_no_key_is_not_read_to_its_end(tmp_path: Path, kind: str, complaint: str) -> None:
    file = tmp_path / "key"
    if kind == "pipe":
        os.mkfifo(file, 0o600)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.touch(mode=0o600)
        os.truncate(file, 1 << 40)
    with pytest.raises(ConfigError, match=complaint):
        cluster_key(load({"key_file": str(file)}, environ={}))


def test_a_number_beyond_all_bounds_is_told_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="arena: a number of 400 digits is no size"):
        load({"arena": "9" * 400}, environ={})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", ""])
def test_what_stands_for_all_addresses_is_not_told_to_others(host: str) -> None:
    with pytest.raises(ConfigError, match="give the address at which peers reach this host"):
        load({"host": host}, environ={})


def test_a_local_key_is_made_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Beside that of somebody of our number in another container, who may have linked it already."""
    tmp_path.chmod(0o700)
    theirs = tmp_path / f"{KEY_NAME}.{os.getpid()}"
    theirs.write_bytes(b"k" * 32)
    made = cluster_key(load({"run_dir": str(tmp_path)}, environ={}))
    assert theirs.read_bytes() == b"k" * 32 != made
    assert {path.name for path in tmp_path.iterdir()} == {theirs.name, KEY_NAME}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a link that is somebody else's")
def test_a_link_that_somebody_else_has_made_is_no_run_directory(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir(mode=0o700)
    link.symlink_to(real)
    assert ensure_run_dir(link) == link
    os.lchown(link, 1234, 1234)
    with pytest.raises(ConfigError, match=f"run directory {link} is a link of uid 1234; set PDX_RUN_DIR"):
        ensure_run_dir(link)


def test_who_chose_the_run_directory() -> None:
    for environ, run_dir, said in (
        ({"PDX_RUN_DIR": "/r"}, "/r", "PDX_RUN_DIR chose it"),
        ({"PDX_RUN_DIR": "/r"}, "/other", "--run-dir or a file of settings chose it"),
        ({"XDG_RUNTIME_DIR": "/x"}, "/x/pdx", "the default, by XDG_RUNTIME_DIR; --run-dir or PDX_RUN_DIR"),
        ({}, default_run_dir({}), "the default, XDG_RUNTIME_DIR is unset here; --run-dir or PDX_RUN_DIR"),
    ):
        assert chooser_of(Path(run_dir), environ).startswith(said)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["--no-return-answers"], False),
        (["--return-answers=false"], False),
        (["--return-answers", "false"], False),
        (["--return-answers"], True),
    ],
)
def test_what_is_true_or_false_can_be_said_in_every_way(words: list[str], expected: bool) -> None:
    parser = argparse.ArgumentParser()
    add_flag(parser, "return_answers")
    assert load(vars(parser.parse_args(words)), environ={}).return_answers is expected


def test_a_service_of_kubernetes_is_no_setting() -> None:
    """What pods are told where a Service is called pdx."""
    links = {
        "PDX_SERVICE_HOST": "10.0.0.9", "PDX_SERVICE_PORT": "5700", "PDX_SERVICE_PORT_CONTROL": "5700",
        "PDX_PORT": "tcp://10.0.0.9:5700", "PDX_PORT_5700_TCP": "tcp://10.0.0.9:5700",
        "PDX_PORT_5700_TCP_PROTO": "tcp", "PDX_PORT_5700_TCP_PORT": "5700", "PDX_PORT_5700_TCP_ADDR": "10.0.0.9",
        "PDX_CONTROL_PORT": "udp://10.0.0.9:5700",
    }  # fmt: skip
    assert load({}, environ=links) == load({}, environ={})
    with pytest.raises(ConfigError, match="unknown key 'prot'"):
        load({}, environ={**links, "PDX_PROT": "tcp://10.0.0.9:5700"})


def test_command_line_over_environment_over_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("arena: 1MiB\nlinger_s: 1\nlease_s: 1\n")
    environ = {"PDX_CONFIG": str(tmp_path / "c.yaml"), "PDX_LINGER_S": "2", "PDX_LEASE_S": "2"}
    config = load({"lease_s": "3"}, environ=environ)
    assert (config.arena, config.linger_s, config.lease_s) == ("1MiB", 2.0, 3.0)
