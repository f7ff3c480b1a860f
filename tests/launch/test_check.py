"""`pdx check`: what it finds, what it says would help, and its exit status."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lanes_here import needing

from pdx.commands import check, lane_figures, machine
from pdx.commands.finding import Finding
from pdx.engine.vllm.compat import SUPPORTED
from pdx.transport.rdma import rdma_here


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of a machine that nobody has configured."""
    for name in [name for name in os.environ if name.startswith("PDX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PDX_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PDX_ARENA", "4MiB")
    return monkeypatch


def found(item: str) -> Finding:
    return next(finding for finding in machine.look() if finding.item == item)


def test_json_names_every_item_and_the_status_follows(capsys: pytest.CaptureFixture[str]) -> None:
    status = check.main(["--format", "json", "--lanes", "none"])
    findings = {each["item"]: each for each in json.loads(capsys.readouterr().out)}
    assert set(findings) == {
        "pdx", "linux", "configuration", "memory", "cores", "address", "cluster key", "router ports", "open files",
        "engine", "torch", "gpu", "rdma", "locked memory", "disk",
    }  # fmt: skip
    assert status == int(any(each["state"] == "missing" for each in findings.values()))
    for each in findings.values():
        assert each["state"] in ("ok", "absent", "missing")
        assert each["line"]
        assert "\n" not in each["line"] + each["fix"]


def test_the_table_shows_a_figure_of_the_lane_that_is_always_there(capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--lanes", "tcp"])
    lines = capsys.readouterr().out.splitlines()
    (memcpy,) = [line for line in lines if line.startswith("ok       memcpy ")]
    (tcp,) = [line for line in lines if line.startswith("ok       lane tcp ")]
    assert memcpy.endswith(" GB/s")
    assert "GB/s between two processes, verified" in tcp


@pytest.mark.prove
@pytest.mark.parametrize("scheme", [pytest.param("nixl", marks=needing("nixl"))])
def test_a_lane_without_rdma_is_there_for_who_asks(scheme: str) -> None:
    (finding,) = lane_figures.lane_findings([scheme])
    assert finding.state == "ok", finding
    if not rdma_here().devices:
        assert finding.line.endswith(f"taken where it is asked for: pdxd --transport {scheme}")


def test_a_lane_that_is_none() -> None:
    (finding,) = lane_figures.lane_findings(["pigeon"])
    assert (finding.item, finding.state) == ("lane pigeon", "absent")
    assert finding.line.startswith("no lane for scheme 'pigeon'; known: nixl, tcp, ucx")


@pytest.mark.skipif(bool(rdma_here().devices), reason="UCX emulates nothing here")
@pytest.mark.parametrize("scheme", [pytest.param("ucx", marks=needing("ucx"))])
def test_a_lane_that_refuses_this_machine_says_why(scheme: str) -> None:
    (finding,) = lane_figures.lane_findings([scheme])
    assert finding.state == "absent"
    assert finding.line.startswith("ucx:// needs RDMA")


# --- what can be wrong ----------------------------------------------------------------------------------------


def test_an_arena_that_does_not_fit(settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings.setenv("PDX_ARENA", "1000TiB")
    assert check.main(["--lanes", "none"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("MISSING  memory"))
    assert lines[at + 1].strip() == "-> set PDX_ARENA to less"


def test_a_configuration_that_can_not_be_read(settings: pytest.MonkeyPatch) -> None:
    settings.setenv("PDX_ARENAS", "4MiB")
    last = list(machine.look())[-1]
    assert (last.item, last.state) == ("configuration", "missing")
    assert "did you mean 'arena'?" in last.line


def test_an_address_of_another_host(settings: pytest.MonkeyPatch) -> None:
    settings.setenv("PDX_HOST", "192.0.2.1")
    assert (found("address").state, found("address").fix) == ("missing", "set PDX_HOST to an address of this host")
    key = found("cluster key")
    assert key.state == "missing"
    assert "set PDX_KEY_FILE" in key.line


def test_ports_of_a_router_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(machine, "ROUTER_PORTS", {port: "requests"})
        finding = found("router ports")
    assert (finding.state, finding.line) == ("absent", f"in use: {port} (requests)")


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))  # daemons take what they may
    assert found("open files").state == "ok"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 512))
    assert (found("open files").state, found("open files").fix) == ("missing", "ulimit -Hn 1024, as root")


@pytest.mark.skipif(bool(rdma_here().devices), reason="this machine has RDMA")
def test_rdma_that_is_required(settings: pytest.MonkeyPatch) -> None:
    assert found("rdma").state == "absent"
    settings.setenv("PDX_REQUIRE_RDMA", "true")
    assert found("rdma").state == "missing"


def test_a_disk_that_can_not_be_used(settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings.setenv("PDX_DISK", str(tmp_path / "absent"))
    assert found("disk").state == "missing"
    settings.setenv("PDX_DISK", "/proc")
    assert found("disk").state == "missing"


@pytest.mark.parametrize(
    ("packages", "state", "says"),
    [
        ({"vllm": "0.32.1"}, "ok", "vllm 0.32.1"),
        ({"vllm": "0.33.0"}, "missing", "pip install 'vllm==0.32.*'"),
        ({}, "missing", "pip install 'pdx-kv[vllm]'"),
    ],
)
def test_engines(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], state: str, says: str) -> None:
    monkeypatch.setattr(machine, "_version", lambda name: packages.get(name, ""))
    finding = found("engine")
    assert finding.state == state
    assert says in f"{finding.line} {finding.fix}"


@pytest.mark.parametrize(
    ("packages", "state", "says"),
    [
        ({}, "missing", "pip install 'pdx-kv[cuda]'"),
        ({"cuda-core": "1.2", "cuda-bindings": "13.0"}, "missing", "no NVRTC"),
        ({"cuda-core": "1.2", "cuda-bindings": "13.0", "nvidia-cuda-nvrtc": "13.0"}, "ok", "cuda.core 1.2"),
    ],
)
def test_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], state: str, says: str) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: ("0",))
    monkeypatch.setattr(machine, "_version", lambda name: packages.get(name, ""))
    monkeypatch.setattr(machine.ctypes.util, "find_library", lambda _: None)
    finding = found("gpu")
    assert finding.state == state
    assert says in f"{finding.line} {finding.fix}"


def test_it_loads_no_engine_and_no_lane(settings: pytest.MonkeyPatch) -> None:
    heavy = ["torch", "vllm", "nixl", "ucxx", "cuda.core", "cuda.bindings"]
    code = (
        "import sys; from pdx.commands import check; check.main(['--lanes', 'none']); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_that_is_looked_for_is_the_one_that_engines_take() -> None:
    """Said twice: a program that only looks must not import what imports vLLM."""
    assert machine.ENGINE_VERSION == "".join(f"{part}." for part in SUPPORTED)
