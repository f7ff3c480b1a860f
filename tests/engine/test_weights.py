"""What of a model goes into its blocks' names; and models of which too little is known for that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: the connector is not tested against it")
pytestmark = pytest.mark.vllm

from huggingface_hub import constants  # noqa: E402
from vllm.config import ModelConfig  # noqa: E402
from vllm.config.quantization import QuantizationConfigArgs  # noqa: E402

from pdx.engine.vllm.weights import _weights_digest  # noqa: E402
from pdx.errors import Refused  # noqa: E402


def digest(
    model: Path | str,
    *,
    load_format: str = "auto",
    download_dir: str | None = None,
    text: dict[str, Any] | None = None,
    **about: Any,
) -> str:
    given = {
        "hf_overrides": {}, "quantization": None, "quantization_config": None, "seed": 0, "max_model_len": 4096,
        "override_generation_config": {}, "revision": None, "hf_config_path": None, "_hf_config_revision": None,
        "model_class_overrides": {}, "code_revision": None, "trust_remote_code": False,
        "disable_sliding_window": False, **about,
    }  # fmt: skip
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model), try_get_generation_config=dict, hf_text_config=SimpleNamespace(**(text or {})), **given
        ),
        load_config=SimpleNamespace(load_format=load_format, download_dir=download_dir),
    )
    return _weights_digest(config)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def weighty(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_a_model_of_a_hub_is_its_snapshot(tmp_path: Path) -> None:
    """What its main branch means today is not what it means tomorrow."""
    hub = tmp_path / "models--org--model"
    (hub / "refs").mkdir(parents=True)
    seen = []
    for commit, weights in (("a" * 40, b"1"), ("b" * 40, b"2"), ("a" * 40, b"1")):
        snapshot = hub / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "pytorch_model.bin").write_bytes(weights * 5000)
        (hub / "refs" / "main").write_text(commit)
        seen.append(digest("org/model", download_dir=str(tmp_path)))
    assert seen[0] == seen[2] != seen[1]
    assert digest("org/model", download_dir=str(tmp_path), revision="b" * 40) == seen[1]


def test_the_configuration_counts_that_vllm_has_read(weighty: Path, tmp_path: Path) -> None:
    """Which may lie elsewhere, where it may be the same."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text((weighty / "config.json").read_text())
    before = digest(weighty)
    assert digest(weighty, hf_config_path=str(elsewhere)) == before
    (elsewhere / "config.json").write_text('{"rms_norm_eps": 0.1}')
    assert digest(weighty, hf_config_path=str(elsewhere)) != before
    for name in ("params.json", "hf_quant_config.json"):
        (weighty / name).write_text("{}")
        after = digest(weighty)
        assert after != before
        before = after


def test_a_model_s_configuration_is_in_the_hub_s_cache_wherever_its_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = [tmp_path / cache / "models--org--model" / "snapshots" / ("a" * 40) for cache in ("weights", "hub")]
    for folder in snapshots:
        folder.mkdir(parents=True)
    (snapshots[0] / "pytorch_model.bin").write_bytes(b"1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    seen = set()
    for text in ("{}", '{"rms_norm_eps": 0.1}'):
        (snapshots[1] / "config.json").write_text(text)
        seen.add(digest("org/model", download_dir=str(tmp_path / "weights"), revision="a" * 40))
    assert len(seen) == 2


def test_code_that_comes_with_the_model_counts_where_it_is_run(weighty: Path) -> None:
    before = [digest(weighty, trust_remote_code=trusted) for trusted in (False, True)]
    assert before[0] == before[1]
    (weighty / "modeling_new.py").write_text("pass")
    assert digest(weighty) == before[0] != digest(weighty, trust_remote_code=True)


@pytest.mark.parametrize(
    "option",
    [
        {"quantization_config": QuantizationConfigArgs(ignore=["lm_head"])},
        {"model_class_overrides": {"LlamaForCausalLM": "mine:Llama"}},
        {"code_revision": "a" * 40},
        {"disable_sliding_window": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_by_which_the_same_files_compute_something_else_count(weighty: Path, option: dict[str, Any]) -> None:
    assert all(hasattr(ModelConfig, name) or name in ModelConfig.__annotations__ for name in option)
    assert digest(weighty) != digest(weighty, **option) == digest(weighty, **option)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_CPU_INT4_W4A8", "0"),
        ("VLLM_HUMMING_INPUT_QUANT_CONFIG", '{"dtype": "int8"}'),
        ("VLLM_HUMMING_ONLINE_QUANT_CONFIG", '{"dtype": "int4"}'),
        ("VLLM_MARLIN_INPUT_DTYPE", "int8"),
        ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random"),
    ],
)
def test_the_environment_may_count_too(weighty: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(weighty)
    monkeypatch.setenv(name, value)
    assert digest(weighty) != before


def test_another_hub_s_model_is_not_that_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").write_bytes(b"1")
    assert digest("org/model", download_dir=str(tmp_path), revision="a" * 40)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    with pytest.raises(Refused, match="can't be told from others"):
        digest("org/model", download_dir=str(tmp_path), revision="a" * 40)


@pytest.mark.parametrize("load_format", ["auto", "runai_streamer"])
def test_weights_that_nobody_can_tell_from_others_are_refused(folder: Path, load_format: str) -> None:
    """As of models in object stores, of which vLLM fetches the configuration first."""
    for model in (folder, "org/model"):
        with pytest.raises(Refused, match="can't be told from others"):
            digest(model, load_format=load_format)
    assert digest(folder, load_format="dummy")


def test_what_tensorizer_loads_is_not_in_the_folder(weighty: Path) -> None:
    with pytest.raises(Refused, match="can't be told from others"):
        digest(weighty, load_format="tensorizer")


def test_a_file_may_be_the_model(tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    one.write_bytes(b"1" * 5000)
    two.write_bytes(b"2" * 5000)
    assert digest(one) != digest(two)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, True),
        ({"model_type": "llama4_text"}, True),
        ({"rope_parameters": {"rope_type": "default"}, "model_type": "llama"}, False),
    ],
    ids=["longrope", "llama4", "others"],
)
def test_the_longest_prompt_counts_where_keys_depend_on_it(
    weighty: Path, text: dict[str, Any], *, counts: bool
) -> None:
    short, long = (digest(weighty, text=text, max_model_len=tokens) for tokens in (4096, 65536))
    assert (short != long) == counts
