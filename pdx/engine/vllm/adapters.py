"""LoRA adapters as part of what KV means: each by the digest of its path and files, and of what vLLM applies of it.

vLLM names an adapter's blocks by its name and path; what lies at that path may differ between two hosts, or between
today and tomorrow. So pdx names them by the files' contents too, and only for adapters that an engine was started with:
what is loaded later, or replaced, is served without pdx.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdx.engine.vllm.asking import Asking, all_local
from pdx.engine.vllm.weights import WEIGHT_SUFFIXES
from pdx.errors import Refused

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

CONFIG_NAME = "adapter_config.json"
NO_ADAPTER = b""

# A folder that changed so short a time ago may have changed again since, at what its file system calls the same time.
SETTLED_S = 2.0

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
        self._asking: Asking[set[str]] = Asking(direct=self._are_local())
        self._listed: dict[str, os.stat_result] = {}  # by path: the folder as it was when it had the start's files

    @property
    def digests(self) -> dict[str, str]:
        """By name, for comparison between engines."""
        return {name: adapter.salt.hex() for name, adapter in self._adapters.items()}

    def salt(self, asked: LoRARequest | None) -> bytes:
        """What a block's name needs beside its hash: NO_ADAPTER for the model itself.

        Raises Refused for an adapter that is not, or no longer, the one that the engine was started with; and for one
        whose files can't be looked at in time, for then nobody knows.
        """
        if asked is None:
            return NO_ADAPTER
        adapter = self._adapters.get(asked.lora_name)
        if adapter is None or adapter.path != asked.lora_path or asked.load_inplace:
            raise Refused(f"adapter {asked.lora_name!r} is none that this engine was started with")
        changed = self._asking.ask(lambda: self._changed([adapter]))
        if changed is None:
            raise Refused(f"the files of adapter {asked.lora_name!r} can't be looked at: their file system is slow")
        if changed:
            raise Refused(f"the files of adapter {asked.lora_name!r} have changed: restart the engine")
        return adapter.salt

    def changed(self, names: Iterable[str]) -> set[str]:
        """Of these, which were those of the start, the ones that are not now, as far as can be known in time."""
        adapters = {name: self._adapters[name] for name in names}
        changed = self._asking.ask(lambda: self._changed(adapters.values()))
        return {name for name, adapter in adapters.items() if changed is None or adapter.path in changed}

    def _are_local(self) -> bool:
        """A folder that is linked from elsewhere later, or a file, has changed."""
        try:
            return all_local(
                f"{adapter.path}/{name}" for adapter in self._adapters.values() for name in (".", *_names(adapter))
            )
        except OSError:
            return False

    def _changed(self, adapters: Iterable[_Adapter]) -> set[str]:
        """Paths of those that have. See `Asking` for the thread."""
        return {adapter.path for adapter in adapters if self._has_changed(adapter)}

    def _has_changed(self, adapter: _Adapter) -> bool:
        """Asks for the times of the folder and its files; lists it only if other files may be there."""
        try:
            return self._differs(adapter)
        except OSError:  # gone, or not to be read any more
            return True

    def _differs(self, adapter: _Adapter) -> bool:
        folder = os.stat(adapter.path)
        listed = self._listed.get(adapter.path)
        if listed is not None and _is_same(folder, listed):
            return any(_of(name, os.stat(f"{adapter.path}/{name}")) != (name, *rest) for name, *rest in adapter.stamp)
        if _stamp(adapter.path) != adapter.stamp:
            return True
        if time.time() - folder.st_ctime > SETTLED_S:
            self._listed[adapter.path] = folder
        return False


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
            stamps.append(_of(file.name, file.stat()))
    return tuple(stamps)


def _names(adapter: _Adapter) -> list[str]:
    return [name for name, *_ in adapter.stamp]


def _of(name: str, status: os.stat_result) -> tuple[str, int, int, int, int]:
    return name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_same(folder: os.stat_result, listed: os.stat_result) -> bool:
    """Whether its entries are still those that it had."""
    return (folder.st_dev, *_of("", folder)) == (listed.st_dev, *_of("", listed))
