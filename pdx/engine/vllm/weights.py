"""What a model's bytes mean, as part of every key: the content fingerprint, from configuration and weight files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pdx.engine.vllm import compat
from pdx.errors import Refused
from pdx.keys import ContentFingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file
SAFETENSORS_HEADER_BYTES_MAX = 100 << 20  # the format's own limit


def content_of(vllm_config: VllmConfig, block_tokens: int) -> ContentFingerprint:
    """Raises Refused where block hashes have a random seed, or a file is none of what its name says."""
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

    The samples tell checkpoints of one shape apart: training changes nearly every weight.
    """
    model = vllm_config.model_config
    digest = hashlib.blake2b(digest_size=16, person=b"pdx-weights")
    overrides = {
        "hf_overrides": repr(model.hf_overrides),
        "quantization": model.quantization,
        "rope": repr(getattr(model.hf_config, "rope_parameters", None)),
        "load_format": str(vllm_config.load_config.load_format),
    }
    if overrides["load_format"] == "dummy":  # random weights
        overrides["seed"] = model.seed
    folder = Path(model.model)
    if not folder.is_dir():
        overrides |= {"model": model.model, "revision": model.revision}
    digest.update(json.dumps(overrides, sort_keys=True, default=str).encode())
    for part in _weight_files(folder) if folder.is_dir() else ():
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _weight_files(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.iterdir()):
        if path.name == "config.json":
            yield path.read_bytes()
        elif path.suffix in WEIGHT_SUFFIXES:
            yield f"{path.name} {path.stat().st_size}".encode()
            if path.suffix == ".safetensors":
                yield _safetensors_header(path)
            yield from _samples(path)


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
