"""LoRA adapters as part of what KV means: each by the digest of its path and files, and of what vLLM applies of it.

vLLM names an adapter's blocks by its name and path; what lies at that path may differ between two hosts, or between
today and tomorrow. So pdx names them by the files' contents too, and only for adapters that an engine was started with:
what is loaded later, or replaced, is served without pdx.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdx.engine.vllm.weights import WEIGHT_SUFFIXES
from pdx.errors import Refused

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

CONFIG_NAME = "adapter_config.json"
NO_ADAPTER = b""

_Stamp = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True)
class _Adapter:
    path: str
    salt: bytes
    stamp: _Stamp


class Adapters:
    """Those that the engine was started with. Reads each file once, at construction."""

    def __init__(self, paths: Mapping[str, str], *, modules: Iterable[str] | None = None) -> None:
        """`paths`: by name, as vLLM is told them. `modules`: the only ones that vLLM applies adapters to; None: all.

        Raises Refused for what is no folder with an adapter.
        """
        only = b"" if modules is None else repr(sorted(modules)).encode()
        self._adapters = {name: _read(name, path, only) for name, path in paths.items()}

    @property
    def digests(self) -> dict[str, str]:
        """By name, for comparison between engines."""
        return {name: adapter.salt.hex() for name, adapter in self._adapters.items()}

    def salt(self, asked: LoRARequest | None) -> bytes:
        """What a block's name needs beside its hash: NO_ADAPTER for the model itself.

        Raises Refused for an adapter that is not, or no longer, the one that the engine was started with.
        """
        if asked is None:
            return NO_ADAPTER
        adapter = self._adapters.get(asked.lora_name)
        if adapter is None or adapter.path != asked.lora_path or asked.load_inplace:
            raise Refused(f"adapter {asked.lora_name!r} is none that this engine was started with")
        try:
            changed = _stamp(adapter.path) != adapter.stamp
        except OSError:  # gone, or not to be read any more
            changed = True
        if changed:
            raise Refused(f"the files of adapter {asked.lora_name!r} have changed: restart the engine")
        return adapter.salt


def _read(name: str, path: str, only: bytes) -> _Adapter:
    try:
        return _read_files(name, path, only)
    except OSError as error:
        raise Refused(f"adapter {name!r} can't be read: {error}") from error


def _read_files(name: str, path: str, only: bytes) -> _Adapter:
    before = _stamp(path)
    if CONFIG_NAME not in [file for file, *_ in before]:
        raise Refused(f"adapter {name!r}: {path} has no {CONFIG_NAME}")
    digest = hashlib.blake2b(digest_size=16, person=b"pdx-adapter")
    digest.update(len(path).to_bytes(8, "little") + path.encode() + only)
    for file, *_ in before:
        with (Path(path) / file).open("rb") as opened:
            content = hashlib.file_digest(opened, "blake2b").digest()
        digest.update(len(file).to_bytes(8, "little") + file.encode() + content)
    if _stamp(path) != before:
        raise Refused(f"adapter {name!r}: {path} changed while it was read")
    return _Adapter(path, digest.digest(), before)


def _stamp(path: str) -> _Stamp:
    """Changes with every change of a file that vLLM may read. (Change times can't be set back.)"""
    stamps = []
    for file in sorted(Path(path).iterdir()) if Path(path).is_dir() else ():
        if file.name == CONFIG_NAME or file.suffix in WEIGHT_SUFFIXES:
            status = file.stat()
            stamps.append((file.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(stamps)
