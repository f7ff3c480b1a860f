"""Files that are written whole or not at all: who waits for one to appear never reads half of it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pdx.errors import ConfigError


def check_place(path: Path, *, flag: str) -> None:
    """Raises ConfigError, naming the flag that said so, where `write_whole` could not: before anything is started."""
    folder = path.absolute().parent
    if path.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "that is a folder" if path.is_dir() else f"there is no folder {folder}, or it can't be written to"
        raise ConfigError(f"{flag} {path}: {why}")


def write_whole(path: Path, content: bytes) -> None:
    """Writes or replaces `path` in one step. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
