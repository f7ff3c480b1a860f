"""What of a model goes into its blocks' names; and models of which too little is known for that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: the connector is not tested against it")
pytestmark = pytest.mark.vllm

from pdx.engine.vllm.weights import _weights_digest  # noqa: E402
from pdx.errors import Refused  # noqa: E402


def digest(model: Path | str, *, load_format: str = "auto", text: dict[str, Any] | None = None, **about: Any) -> str:
    given = {"download_dir": None, "max_model_len": 4096, "revision": None, **about}
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model), hf_overrides={}, quantization=None, seed=0, max_model_len=given["max_model_len"],
            override_generation_config={}, try_get_generation_config=dict, revision=given["revision"],
            hf_text_config=SimpleNamespace(**(text or {})),
        ),
        load_config=SimpleNamespace(load_format=load_format, download_dir=given["download_dir"]),
    )  # fmt: skip
    return _weights_digest(config)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


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


@pytest.mark.parametrize("load_format", ["auto", "runai_streamer"])
def test_weights_that_nobody_can_tell_from_others_are_refused(folder: Path, load_format: str) -> None:
    """As of models in object stores, of which vLLM fetches the configuration first."""
    for model in (folder, "org/model"):
        with pytest.raises(Refused, match="can't be told from others"):
            digest(model, load_format=load_format)
    assert digest(folder, load_format="dummy")


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
def test_the_longest_prompt_counts_where_keys_depend_on_it(folder: Path, text: dict[str, Any], *, counts: bool) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    short, long = (digest(folder, text=text, max_model_len=tokens) for tokens in (4096, 65536))
    assert (short != long) == counts
