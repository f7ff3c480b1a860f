"""What a model's bytes mean, as part of every key: the content fingerprint, from configuration and weight files."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pdx.engine.vllm import compat
from pdx.errors import Refused
from pdx.keys import ContentFingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_NAMES = ("config.json", "params.json", "hf_quant_config.json")  # the model's, in the forms that vLLM reads
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file
SAFETENSORS_HEADER_BYTES_MAX = 100 << 20  # the format's own limit


def content_of(vllm_config: VllmConfig, block_tokens: int) -> ContentFingerprint:
    """Raises Refused where block hashes have a random seed, a file is none of what its name says, or there is none."""
    model = vllm_config.model_config
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    return ContentFingerprint(
        model=str(model.served_model_name or model.model),
        weights=_weights_digest(vllm_config),
        weight_epoch="",
        dtype=compat.dtype_name(model.dtype),
        block_tokens=block_tokens,
        hash_algorithm=f"{algorithm}/{compat.hash_seed(algorithm)}",
    )


def _weights_digest(vllm_config: VllmConfig) -> str:
    """Names, sizes, headers and samples of the weight files, and what changes their meaning. Not their gigabytes.

    The samples tell checkpoints of one shape apart: training changes nearly every weight. Of a hub's model they are
    those of the snapshot that vLLM has loaded, for what a branch means may change. Raises Refused where there are none.
    Options by which engines only round otherwise, such as kernels, do not count: such engines share their blocks.
    """
    model = vllm_config.model_config
    digest = hashlib.blake2b(digest_size=16, person=b"pdx-weights")
    rope = compat.rope_of(model)
    overrides = {
        "hf_overrides": repr(model.hf_overrides),
        "quantization": [model.quantization, model.quantization_config],
        "environment": compat.overriding_environment(),
        "classes": model.model_class_overrides,
        "code_revision": model.code_revision,
        "windows_off": model.disable_sliding_window,  # vLLM can be told to take longer prompts all the same
        "rope": rope,
        "load_format": str(vllm_config.load_config.load_format),
    }
    if "longrope" in rope or "llama4" in str(getattr(model.hf_text_config, "model_type", "")):
        # vLLM chooses their rotation, or their attention's temperature, by the longest prompt that it is to serve.
        overrides["longest"] = [
            model.max_model_len, model.override_generation_config, model.try_get_generation_config()
        ]  # fmt: skip
    is_random = overrides["load_format"] == "dummy"
    if is_random:
        overrides["seed"] = model.seed
    digest.update(json.dumps(overrides, sort_keys=True, default=str).encode())
    where = _local(model.model, revision=model.revision, cache=vllm_config.load_config.download_dir)
    files = [file for file in _files(where) if _has_weights(file)]
    if not is_random and (not files or overrides["load_format"] == "tensorizer"):
        raise Refused(
            f"the weights of {model.model} can't be told from others: vLLM has them from no files of a folder on this "
            "host; download it, and name the folder"
        )
    name, revision = compat.config_source(model)
    about = _local(name, revision=revision, cache=None)  # vLLM downloads weights only to where it is told
    files = [file for file in _files(about) if _says_how(file, code=model.trust_remote_code)] + files
    for part in itertools.chain.from_iterable(map(_content, files)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _local(name: str, *, revision: str | None, cache: str | None) -> Path | None:
    """Where the files of a model, or of its configuration, are on this host. No `cache`: in the hub's own."""
    if Path(name).exists():
        return Path(name)
    if compat.uses_another_hub():
        return None
    from huggingface_hub import snapshot_download

    try:  # looks into the cache only: vLLM has loaded the model by now
        found = snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found)


def _files(path: Path | None) -> list[Path]:
    """Of a model's folder; or the only one that it is, as of GGUF."""
    if path is None:
        return []
    return [path] if path.is_file() else sorted(path.iterdir())


def _says_how(file: Path, *, code: bool) -> bool:
    """Whether it says what is computed from the weights."""
    return file.name in CONFIG_NAMES or (code and file.suffix == ".py")


def _has_weights(file: Path) -> bool:
    return file.suffix in WEIGHT_SUFFIXES


def _content(file: Path) -> Iterator[bytes]:
    if not _has_weights(file):
        yield file.read_bytes()
        return
    yield f"{file.name} {file.stat().st_size}".encode()
    if file.suffix == ".safetensors":
        yield _safetensors_header(file)
    yield from _samples(file)


def _samples(path: Path) -> Iterator[bytes]:
    """Spread evenly over the file, its last bytes among them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, (size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
            yield file.read(SAMPLE_BYTES)


def _safetensors_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > SAFETENSORS_HEADER_BYTES_MAX:
            raise Refused(f"{path.name} is no safetensors file")
        return file.read(length)
