"""What `pdx up` would start, without starting it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdx.errors import ConfigError
from pdx.launch import up
from pdx.launch.fleet import Fleet, Ground, Wish, design
from pdx.launch.gpus import visible_gpus
from pdx.launch.shares import shares

BASE = Path("/base")


def designed(
    *, prefill: int = 1, decode: int = 1, hosts: int = 1, cores: tuple[int, ...] = (0, 1), gpus: tuple[str, ...] = (),
    flags: tuple[str, ...] = (), settings: dict[str, str] | None = None,
) -> Fleet:  # fmt: skip
    wish = Wish(model="m", prefill=prefill, decode=decode, hosts=hosts, settings=settings or {}, flags=flags)
    return design(wish, Ground(base=BASE, cores=cores, gpus=gpus, ports=tuple(range(21000, 21000 + prefill + decode))))


@pytest.mark.parametrize(
    ("said", "gpus"),
    [
        ("0,1", ("0", "1")),
        (" 2 , GPU-8932f937-d72c", ("2", "GPU-8932f937-d72c")),
        ("MIG-3b1,0", ("MIG-3b1", "0")),
        ("-1", ()),
        ("0,-1,1", ("0",)),
        ("none", ()),
        ("", ()),
    ],
)
def test_gpus_are_those_that_cuda_sees(said: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert visible_gpus() == gpus


def test_one_host_has_one_daemon() -> None:
    fleet = designed()
    assert [daemon.run_dir for daemon in fleet.daemons] == [BASE / "a"]
    assert [spec.settings["run_dir"] for spec in fleet.engines] == ["/base/a", "/base/a"]


def test_two_hosts_part_prefill_from_decode() -> None:
    fleet = designed(prefill=2, decode=1, hosts=2)
    assert [(spec.name, spec.settings["run_dir"]) for spec in fleet.engines] == [
        ("prefill-0", "/base/a"),
        ("prefill-1", "/base/a"),
        ("decode-0", "/base/b"),
    ]


def test_daemons_get_their_settings_and_each_a_folder_of_its_own() -> None:
    settings = {"arena": "64MiB", "disk": "/d", "offload": "off"}
    fleet = designed(hosts=2, settings=settings)
    assert [daemon.settings for daemon in fleet.daemons] == [
        {"arena": "64MiB", "disk": "/d/a"},
        {"arena": "64MiB", "disk": "/d/b"},
    ]
    for spec, disk in zip(fleet.engines, ("/d/a", "/d/b"), strict=True):
        assert spec.settings.items() >= {"arena": "64MiB", "disk": disk, "offload": "off"}.items()
    assert designed(settings=settings).daemons[0].settings["disk"] == "/d"


def test_pins_keep_prefill_and_decode_apart() -> None:
    fleet = designed(hosts=2)
    assert str(fleet) == (
        "pdxd-a on core 0, pdxd-b on core 1, prefill-0 on core 0, decode-0 on core 1, router on core 1"
    )


def test_without_cores_nothing_is_pinned() -> None:
    assert str(designed(cores=())).count("any core") == 4


def test_cpu_engines_get_a_bounded_kv_cache_unless_told() -> None:
    assert designed(flags=("-x",)).engines[0].flags == ("--kv-cache-memory-bytes", str(1 << 30), "-x")
    told = ("--kv_cache_memory_bytes=5",)
    assert designed(flags=told).engines[0].flags == told


def test_gpus_are_dealt_out() -> None:
    fleet = designed(gpus=("0", "1", "2", "3"))
    assert [spec.gpus for spec in fleet.engines] == ["0,1", "2,3"]
    assert fleet.engines[0].flags == ()


def test_engines_of_one_gpu_share_its_memory() -> None:
    fleet = designed(gpus=("0",))
    assert [(spec.gpus, spec.flags) for spec in fleet.engines] == [("0", ("--gpu-memory-utilization", "0.45"))] * 2


@pytest.mark.parametrize(
    ("items", "count", "expected"),
    [
        ((), 2, [(), ()]),
        ((0, 1), 3, [(0,), (1,), (0,)]),
        ((0, 1), 2, [(0,), (1,)]),
        (tuple(range(5)), 2, [(0, 1), (2, 3, 4)]),
    ],
)
def test_shares(items: tuple[int, ...], count: int, expected: list[tuple[int, ...]]) -> None:
    assert shares(items, count) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prefill", "1"], "MODEL comes first"),
        (["m", "--decode", "0"], "at least one decode engine"),
        (["m", "--arena", "x"], "not a size"),
        (["m", "--publish", "/no/such/x"], "there is no folder /no/such"),
        (["m", "--policy", "prefix"], "PDX_ROUTER_POLICY=…"),
        (["m", "--lane-port=7"], "--lane-port is a setting of pdxd, .* PDX_LANE_PORT=…"),
        (["m", "--run-dir", "/x"], "--run-dir is set by pdx itself"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        up.parse(argv)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["/no/model"], "MODEL /no/model: there is no such file or folder"),
        (["m", "--key-file", "/no/key"], "cluster key /no/key: No such file"),
        (["m", "--transport", "pigeon"], "no lane for scheme 'pigeon'"),
    ],
)
def test_what_daemons_would_refuse_is_refused_before_anything_starts(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert up.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdx up: ") and says in line


def test_alias_and_passed_flags() -> None:
    for name in ("--daemons", "--hosts"):
        options = up.parse(["m", name, "2", "--enforce-eager", "--max-model-len", "512"])
        assert options.wish.hosts == 2
        assert options.wish.flags == ("--enforce-eager", "--max-model-len", "512")


def test_a_key_of_the_operators_is_taken_and_not_shown_to_vllm(tmp_path: Path) -> None:
    options = up.parse(["m", "--key-file", str(tmp_path / "key"), "--disk", str(tmp_path / "disk")])
    assert options.key_file == str(tmp_path / "key")
    assert options.wish.settings == {"disk": str(tmp_path / "disk")}


def test_two_daemons_have_no_port_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PDX_CONTROL_PORT", "PDX_LANE_PORT"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "5800")
            assert up.parse(["m"]).hosts == 1
            with pytest.raises(ConfigError, match=f"{name} names one port"):
                up.parse(["m", "--daemons", "2"])
