"""`pdx serve`: what it plans, what it refuses, and a whole life with an engine that is a small HTTP server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from daemon.fleet import until
from programs import pdx, read_until

from pdx.config import load
from pdx.engine.vllm import settings
from pdx.errors import ConfigError
from pdx.launch import beforehand, engine, serve

WAIT_S = 20.0


def planned(*argv: str) -> list[engine.EngineSpec]:
    options = serve.parse(argv)
    return serve.plan(options, ports=[21000 + index for index in range(options.replicas)])


@pytest.mark.parametrize(
    ("role", "kv_role"),
    [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("both", "kv_both"), ("kv_both", "kv_both")],
)
def test_roles(role: str, kv_role: str) -> None:
    (spec,) = planned("m", "--kv-role", role)
    assert transfer_config(spec)["kv_role"] == kv_role


def test_roles_are_called_as_the_connector_reads_them() -> None:
    """Said twice: who starts engines must not import what imports vLLM."""
    assert {theirs: role for role, theirs in engine.KV_ROLES.items()} == settings._ROLES


def test_transfer_config() -> None:
    (spec,) = planned("m", "--kv-role", "prefill", "--router", "tcp://127.0.0.1:5700", "--arena", "64MiB")
    assert transfer_config(spec) == {
        "kv_connector": "PdxConnector",
        "kv_connector_module_path": "pdx.engine.vllm.connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {
            "arena": "64MiB",
            "router": "tcp://127.0.0.1:5700",
            "url": "http://127.0.0.1:21000",
            "engine_id": "prefill-21000",
        },
    }


def test_the_engines_host_is_their_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it was set: a router of another host is told where they listen."""
    monkeypatch.setenv("PDX_HOST", "192.0.2.1")
    monkeypatch.setenv("PDX_RUN_DIR", "/nowhere")
    (spec,) = planned("m", "--kv-role", "prefill")
    assert (spec.host, spec.url) == ("192.0.2.1", "http://192.0.2.1:21000")
    (spec,) = planned("m", "--kv-role", "prefill", "--host", "::1")
    assert (spec.host, spec.url) == ("::1", "http://[::1]:21000")


def test_several_routers() -> None:
    (spec,) = planned("m", "--kv-role", "decode", "--router", "tcp://a:1", "--router", "tcp://b:2")
    assert transfer_config(spec)["kv_connector_extra_config"]["router"] == "tcp://a:1,tcp://b:2"


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora-modules", "one=/a", '{"name": "two", "path": "/b", "base_model_name": "m"}', "--seed", "0"],
        ["--enable-lora", "--lora_modules=one=/a", "two=/b"],
    ],
)
def test_the_connector_is_told_of_adapters(flags: list[str]) -> None:
    (spec,) = planned("m", "--kv-role", "prefill", *flags)
    assert transfer_config(spec)["kv_connector_extra_config"]["adapters"] == {"one": "/a", "two": "/b"}


@pytest.mark.parametrize("module", ["one", '{"name": "one"}', "[1, 2]"])
def test_an_adapter_without_a_path_is_refused(module: str) -> None:
    (spec,) = planned("m", "--kv-role", "prefill", "--lora-modules", module)
    with pytest.raises(ConfigError, match="NAME=PATH"):
        engine.command(spec)


def test_the_key_file_is_not_in_what_vllm_logs(tmp_path: Path) -> None:
    (spec,) = planned("m", "--kv-role", "prefill", "--key-file", str(tmp_path / "key"))
    assert "key" not in json.dumps(engine.command(spec))


def test_settings_of_daemon_and_engine_are_flags_and_an_api_key_is_vllms() -> None:
    flags = ("--disk", "/d", "--no-return-answers", "--offload=prompts", "--lookup-s", "0.5")
    (spec,) = planned("m", "--kv-role", "both", *flags, "--api-key", "k")
    assert spec.settings == {"disk": "/d", "return_answers": "false", "offload": "prompts", "lookup_s": "0.5"}
    assert spec.flags == ("--api-key", "k")


def test_engine_flags_pass_in_order() -> None:
    (spec,) = planned("m", "--max-model-len", "4096", "--kv-role", "both", "--enforce-eager", "-tp=2")
    assert spec.flags == ("--max-model-len", "4096", "--enforce-eager", "-tp=2")
    assert engine.command(spec)[-4:] == list(spec.flags)


def test_replicas_have_names_and_ports_of_their_own() -> None:
    specs = planned("m", "--kv-role", "decode", "--replicas", "3", "--name", "d")
    assert [spec.name for spec in specs] == ["d-21000", "d-21001", "d-21002"]
    assert len({spec.url for spec in specs}) == 3


def test_names_differ_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that hears of two engines of one name takes the first."""
    monkeypatch.setenv("PDX_RUN_DIR", "/nowhere")
    specs = [*planned("m", "--kv-role", "decode", "--host", "192.0.2.1")]
    specs += planned("m", "--kv-role", "decode", "--host", "192.0.2.2", "--replicas", "2", "--name", "d")
    assert [spec.name for spec in specs] == ["decode-192.0.2.1-21000", "d-192.0.2.2-21000", "d-192.0.2.2-21001"]


@pytest.mark.parametrize(
    ("gpus", "flags", "dealt", "memory"),
    [
        ((), (), ["", ""], ("--kv-cache-memory-bytes", "1073741824")),
        (("0",), (), ["0", "0"], ("--gpu-memory-utilization", "0.45")),
        (("0", "1"), (), ["0", "1"], ()),
        (("0", "1", "2", "3"), ("-tp=2",), ["0,1", "2,3"], ()),
        (("0",), ("--gpu-memory-utilization=0.3",), ["0", "0"], ()),
    ],
)
def test_replicas_divide_gpus_and_memory(
    gpus: tuple[str, ...], flags: tuple[str, ...], dealt: list[str], memory: tuple[str, ...]
) -> None:
    options = serve.parse(["m", "--kv-role", "both", "--replicas", "2", *flags])
    specs = serve.plan(options, ports=[21000, 21001], gpus=gpus)
    assert [spec.gpus for spec in specs] == dealt
    assert [spec.flags for spec in specs] == [(*memory, *flags)] * 2
    (alone,) = serve.plan(serve.parse(["m", "--kv-role", "both", *flags]), ports=[21000], gpus=gpus)
    assert (alone.gpus, alone.flags) == ("", flags), "one has what vLLM gives it"


@pytest.mark.parametrize(
    ("flags", "name"),
    [((), "m"), (("--served-model-name", "a", "b"), "a"), (("--served_model_name=c",), "c"), (("--seed", "1"), "m")],
)
def test_what_clients_call_the_model(flags: tuple[str, ...], name: str) -> None:
    (spec,) = planned("m", "--kv-role", "both", *flags)
    assert spec.served_name == name


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1", "soon"])
def test_a_time_that_no_wait_could_last(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.parse(["m", "--kv-role", "both", "--ready-timeout-s", text])
    assert "is no time" in capsys.readouterr().err


def test_one_replica_keeps_its_name() -> None:
    (spec,) = planned("m", "--kv-role", "decode", "--name", "d")
    assert spec.name == "d"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kv-role", "both"], "MODEL comes first"),
        (["m", "--kv-role", "both", "--kv-transfer-config", "{}"], "written by pdx"),
        (["m", "--kv-role", "both", "--kv_transfer_config={}"], "written by pdx"),
        (["m", "--kv-role", "both", "--kv-transfer-config.kv_role=x"], "written by pdx"),
        (["m", "--kv-role", "both", "--arena", "much"], "'much' is not a size"),
        (["m", "--kv-role", "both", "--cpus", "all"], "not a list of cores"),
        (["m", "--kv-role", "both", "--cpus", "3-1"], "not a list of cores"),
        (["m", "--kv-role", "both", "--replicas", "0"], "must be positive"),
        (["m", "--kv-role", "both", "--publish", "/no/such/x"], "there is no folder /no/such"),
        (["m", "--kv-role", "both", "--policy=prefix"], "--policy is a setting of pdx-router, .* PDX_ROUTER_POLICY=…"),
        (["m", "--kv-role", "both", "--no-pass-api-key"], "PDX_ROUTER_PASS_API_KEY=…"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve.parse(argv)


def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["m", "--kv-role", "both", "--arena", "much"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["./no/model"], "MODEL ./no/model: there is no such file or folder"),
        (["m", "--key-file", "/no/key"], "cluster key /no/key: No such file"),
        (["m", "--host", "10.0.0.9"], "host 10.0.0.9 is not loopback and no cluster key is set"),
        (["m", "--port", "65535", "--replicas", "2"], "--port 65535: 2 from there on are not all between 1 and 65535"),
        (["m", "--transport", "pigeon"], "no lane for scheme 'pigeon'; known: nixl, tcp, ucx"),
        (["m", "--router", "tcp://a:1", "--router", "http://b:2"], "router: 'http://b:2' is not tcp://host:port"),
        (["m", "--tls-cert", "/c", "--tls-key", "/k", "--tls-ca", "/a"], "/k: No such file"),
    ],
)
def test_what_its_daemon_would_refuse_is_refused_before_anything_starts(
    tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main([*words, "--kv-role", "both", "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdx serve: ") and says in line


def test_who_starts_no_daemon_needs_no_key(tmp_path: Path) -> None:
    told = {"host": "10.0.0.9", "start_daemon": "false", "run_dir": str(tmp_path)}
    beforehand.check_engines(load(told, environ={}))


@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        (("--tensor-parallel-size", "2"), "0,1|2,3"),
        (("--enforce-eager", "-tp=4"), "0|1|2|3"),
        (("--tensor_parallel_size=1",), "0-3"),
        (("--tensor-parallel-size", "many"), "0-3"),
        ((), "0-3"),
    ],
)
def test_every_rank_has_its_share_of_the_cores(flags: tuple[str, ...], bound: str) -> None:
    (spec,) = planned("m", "--kv-role", "both", "--cpus", "0-3", *flags)
    assert engine.environment(spec)["VLLM_CPU_OMP_THREADS_BIND"] == bound


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_whole_life(tmp_path: Path, number: signal.Signals) -> None:
    core = str(min(os.sched_getaffinity(0)))
    with serving(tmp_path, "--replicas", "2", "--cpus", core, "--enforce-eager") as process:
        lines = read_until(process, "decode-", " at http://", count=2)
        until((tmp_path / "engines.json").exists, "published")
        published = json.loads((tmp_path / "engines.json").read_text())["engines"]
        process.send_signal(number)
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, out
    assert out.splitlines()[-1] == "pdx: stopped 2 processes, 0 left"
    assert [found["role"] for found in published] == ["decode", "decode"]
    said = [json.loads(line.partition("| ")[2]) for line in lines if "| {" in line]
    assert {options["port"] for options in said} == {int(found["url"].rpartition(":")[2]) for found in published}
    for options in said:
        assert options["cores"] == [int(core)]
        assert options["env"] == {"VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": core}
        assert options["prefix_caching_hash_algo"] == "sha256_cbor"
        assert options["enforce_eager"]
    assert not (tmp_path / "engines.json").exists()


def test_engines_outlive_each_other_until_none_is_left(tmp_path: Path) -> None:
    with serving(tmp_path, "--replicas", "2") as process:
        lines = read_until(process, "decode-", " at http://", count=2)
        first, second = (json.loads(line.partition("| ")[2])["pid"] for line in lines if "| {" in line)
        os.kill(first, signal.SIGKILL)
        read_until(process, "ended with exit code 137; the others serve on: decode-")
        os.kill(second, signal.SIGKILL)
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert out.splitlines()[-1] == "pdx: stopped 0 processes, 0 left"


def test_an_unknown_flag_is_the_engines_to_refuse(tmp_path: Path) -> None:
    with serving(tmp_path, "--no-such-flag") as process:
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "unrecognized arguments: --no-such-flag" in out
    assert out.splitlines()[-1] == "pdx: stopped 0 processes, 0 left"


def serving(tmp_path: Path, *flags: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return pdx("serve", "m", "--kv-role", "decode", "--publish", str(tmp_path / "engines.json"), *flags)


def transfer_config(spec: engine.EngineSpec) -> dict[str, object]:
    command = engine.command(spec)
    return json.loads(command[command.index("--kv-transfer-config") + 1])
