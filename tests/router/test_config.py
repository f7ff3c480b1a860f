"""Where a router's settings come from, which of them wins, and what is said of those that can't work."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdx.config import load
from pdx.errors import ConfigError
from pdx.router.config import RouterConfig, dumped, resolved
from pdx.router.flags import ALIASES, ELSEWHERE, parsed
from pdx.router.main import main, options_of, warn_of_no_keys

# The flags of vllm-router 0.1.17 for what this router has not: they get "unknown flag".
NOT_HERE = {
    "--router-temperature", "--kv-penalty-host", "--kv-penalty-external", "--kv-penalty-disk",
    "--kv-aware-session-affinity-ttl-secs", "--enable-program-scheduling", "--program-scheduling-config-json",
    "--mini-lb", "--enable-igw", "--wasm-middleware", "--wasm-middleware-sha256", "--wasm-middleware-route",
    "--rate-limit-tokens-per-second", "--max-concurrent-requests",
}  # fmt: skip


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PDX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PDX_RUN_DIR", str(tmp_path / "run"))


def written(path: Path, **settings: object) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_who_wins(tmp_path: Path) -> None:
    file = written(tmp_path / "r.yaml", port=1, max_waiting=2, journey="after", decode=["http://a:1", "http://b:1"])
    variables = {"PDX_ROUTER_PORT": "3", "PDX_ROUTER_MAX_WAITING": "4", "PDX_KEY_FILE": "/k", "PDX_ROUTER_CONFIG": file}
    found = resolved({"port": 5, "host": None}, environ=variables)
    config, origins = found.config, found.origins
    assert (config.port, config.max_waiting, config.journey, config.key_file) == (5, 4, "after", "/k")
    assert config.decode == ["http://a:1", "http://b:1"]
    assert [origins[key] for key in ("port", "max_waiting", "journey", "key_file", "host")] == [
        "command line", "environment", file, "pdx", "default"
    ]  # fmt: skip
    other = written(tmp_path / "other.yaml", port=7)
    assert resolved({"config": other}, environ={"PDX_ROUTER_CONFIG": file}).config.port == 7


def test_a_list_in_a_variable() -> None:
    config = resolved({}, environ={"PDX_ROUTER_CORS_ORIGIN": "https://a, https://b"}).config
    assert config.cors_origin == ["https://a", "https://b"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_waitin": 1}, "unknown key 'max_waitin', did you mean 'max_waiting'?"),
        ({"port": 70_000}, "port: 70000: expected `int` <= 65535"),
        ({"port": "x"}, "port: 'x': expected `int"),
        ({"policy": "random"}, "policy is one of prefix, round_robin, least_loaded"),
        ({"request_timeout_s": 0}, "request_timeout_s: 0: expected `float` > 0"),
        ({"decode": ["ftp://x"]}, "ftp://x: an engine's address begins with http://"),
        ({"max_body": "many"}, "max_body: 'many' is not a size"),
        ({"max_bodies": "many"}, "max_bodies: 'many' is not a size"),
        ({"handoff_grant_s": -1}, "handoff_grant_s"),
    ],
)
def test_errors_name_the_key_and_where_it_stands(
    settings: dict[str, object], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "r.yaml", **settings)
    assert main(["--config", file]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    if "ftp" not in complaint and "size" not in complaint:
        assert file in said


def test_what_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a: [", "- 1", "\x00"):
        (tmp_path / "r.yaml").write_text(text)
        assert main(["--config", str(tmp_path / "r.yaml")]) == 2
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_routers_variables_are_no_business_of_daemons() -> None:
    assert load(environ={"PDX_ROUTER_PORT": "1", "PDX_ROUTER": "tcp://127.0.0.1:1"}).router == "tcp://127.0.0.1:1"
    with pytest.raises(ConfigError, match="unknown key 'prt'"):
        resolved({}, environ={"PDX_ROUTER_PRT": "1"})


def test_a_service_of_kubernetes_is_no_setting() -> None:
    """What pods are told where a Service is called pdx-router: one of these names is that of a setting."""
    links = {
        "PDX_ROUTER_SERVICE_HOST": "10.0.0.9", "PDX_ROUTER_SERVICE_PORT": "8000",
        "PDX_ROUTER_SERVICE_PORT_HTTP": "8000", "PDX_ROUTER_PORT": "tcp://10.0.0.9:8000",
        "PDX_ROUTER_PORT_8000_TCP": "tcp://10.0.0.9:8000", "PDX_ROUTER_PORT_8000_TCP_PROTO": "tcp",
        "PDX_ROUTER_PORT_8000_TCP_PORT": "8000", "PDX_ROUTER_PORT_8000_TCP_ADDR": "10.0.0.9",
        "PDX_ROUTER_ADMIN_PORT": "tcp://10.0.0.9:8001",
    }  # fmt: skip
    assert resolved({}, environ=links) == resolved({}, environ={})


def test_seconds_by_their_former_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "r.yaml", drain_secs=1, keep_alive_secs=2)
    flags = vars(parsed(["--config", file, "--cb-timeout-secs", "3", "--request-timeout-secs", "4"]))
    del flags["dump_config"]
    config = resolved(flags, environ={"PDX_ROUTER_KEEP_ALIVE_SECS": "5"}).config
    assert (config.drain_s, config.keep_alive_s, config.cb_timeout_s, config.request_timeout_s) == (1, 5, 3, 4)
    with pytest.raises(SystemExit):
        parsed(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--drain-s S" in said
    assert "--drain-secs" not in said
    assert "(default: 120.0)" in said.rpartition("--handoff-total-s S")[2].partition("--")[0], "a budget's default"


def test_a_dump_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "r.yaml", max_waiting=7)
    flags = [
        "--config",
        file,
        "--handoff-total-s",
        "7",
        "--policy",
        "least_loaded",
        "--api-key",
        "secret-secret-secret",
    ]
    assert main([*flags, "--dump-config"]) == 0
    shown = capsys.readouterr().out
    assert "secret" not in shown
    lines = shown.splitlines()
    assert f"max_waiting: 7  # {file}" in lines
    assert "handoff_total_s: 7.0  # command line" in lines
    assert "handoff_grant_s: 10.0  # default" in lines
    assert "api_key: []  # command line: 1 that are not shown" in lines
    assert {line.split(":")[0] for line in lines} == set(RouterConfig.__struct_fields__)
    (tmp_path / "again.yaml").write_text(shown)
    again = resolved({"config": str(tmp_path / "again.yaml")})
    assert again.config.policy == "least_loaded"
    assert yaml.safe_load(dumped(again)) == yaml.safe_load(shown)


def test_every_setting_reaches_the_server() -> None:
    """All flags at values that are no defaults: the options differ in each of their parts."""
    flags = {
        "host": "localhost", "port": 1, "control": "tcp://127.0.0.1:9", "admin_host": "localhost", "admin_port": 3,
        "publish": "x", "prefill": ["http://p:1"], "decode": ["http://d:1"], "policy": "least_loaded",
        "journey": "paired", "max_waiting": 1, "max_wait_s": 1, "request_timeout_s": 2, "prefill_timeout_s": 3,
        "handoff_grant_s": 4, "api_key": ["k" * 20], "pass_api_key": True, "cors_origin": ["https://a"],
        "max_body": "1MiB", "max_bodies": "2GiB", "keep_alive_s": 5, "workers": 2, "max_in_flight_prefill": 1,
        "max_in_flight_decode": 1, "retries": 1, "queue_size": 1, "queue_timeout_s": 1, "cb_failure_threshold": 1,
        "drain_s": 1, "request_log": "x", "public_metrics": False,
    }  # fmt: skip
    plain, changed = options_of(resolved({})), options_of(resolved(flags))
    for struct, other in ((plain, changed), (plain.settings, changed.settings), (plain.door, changed.door)):
        same = {name for name in type(struct).__struct_fields__ if getattr(struct, name) == getattr(other, name)}
        # The token and the key come from files; the rest is what workers tell each other.
        told = {"hub", "worker", "follows", "own_metrics", "all_metrics", "life"}
        assert same <= {"admin_token", "cluster_key"} | told
    assert (changed.door.body_bytes_max, changed.settings.budgets.grant_s, changed.idle_s) == (1 << 20, 4.0, 5.0)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--polcy", "x"], "unknown flag --polcy, did you mean '--policy'?"),
        (["--kv-connector", "nixl"], "--kv-connector is not a flag of this router: engines bring pdx's own connector"),
        (["--prefill", "http://p:1", "9000"], "'9000' belongs to no flag"),
        (["--port", "70000"], "--port: '70000': expected `int` <= 65535"),
        (["--ssl-certfile", "x"], "--ssl-certfile is not a flag of this router: this router speaks HTTP without TLS"),
        (["--max-waitin", "1"], "unknown flag --max-waitin, did you mean '--max-waiting'?"),
    ],
)
def test_bad_flags_say_what_would_be_good(flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(flags)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_other_routers_names() -> None:
    flags = vars(parsed(["--cors-allowed-origins", "https://a", "--max-payload-size", "1048576"]))
    assert (flags["cors_origin"], flags["max_body"]) == (["https://a"], "1048576")
    ours = {f"--{key.replace('_', '-')}" for key in RouterConfig.__struct_fields__} | set(sum(ALIASES.values(), ()))
    assert not ours & set(ELSEWHERE)


def test_every_flag_of_vllm_router_is_taken_or_answered() -> None:
    router_args = pytest.importorskip("vllm_router.router_args", reason="vllm-router is not installed: pdx-kv[bench]")
    parser = argparse.ArgumentParser()
    router_args.RouterArgs.add_cli_args(parser)
    theirs = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    ours = {f"--{key.replace('_', '-')}" for key in RouterConfig.__struct_fields__} | set(sum(ALIASES.values(), ()))
    assert theirs - ours - set(ELSEWHERE) - NOT_HERE - {"--help"} <= set()


@pytest.mark.parametrize(
    ("flags", "warned"), [({}, True), ({"api_key": ["k" * 20]}, False), ({"host": "127.0.0.1"}, False)]
)
def test_a_router_that_answers_anybody_says_so(
    flags: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = resolved({"host": "192.0.2.1", "key_file": "/k", **flags}, environ={}).config
    warn_of_no_keys(config)
    assert ("--api-key-file" in caplog.text) == warned


def test_a_key_that_is_no_text_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    for written in (
        "api_key: 1234567890123456",
        "api_key: {a: secret-1234567890123456}",
        'api_key: "secret-1234567890123456',
    ):
        file.write_text(written)
        with pytest.raises(ConfigError) as refused:
            resolved({"config": str(file)}, environ={})
        assert "1234567890123456" not in str(refused.value), written
        assert "router.yaml" in str(refused.value)
