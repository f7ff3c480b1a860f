"""Files that are written whole or not at all: who waits for one to appear never reads half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from pdx.errors import ConfigError


def check_place(path: Path, *, flag: str) -> None:
    """Raises ConfigError, naming the flag that said so, where `write_whole` could not, or would take the place of what
    is no file of somebody's (a device, a pipe): before anything is started."""
    folder = _target(path).parent
    if os.path.isdir(path):  # as below, it says no where Path's would raise PermissionError
        raise ConfigError(f"{flag} {path}: that is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{flag} {path}: that is no regular file, and would be replaced by one; name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: there is no folder {folder}, or it can't be written to")


def write_whole(path: Path, content: bytes) -> None:
    """Writes or replaces `path`, or what it is a link to, in one step. Raises OSError."""
    target = _target(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(target)
    except BaseException:
        remove(unfinished)
        raise


def remove(path: Path) -> None:
    """Removes `path`, or what it is a link to, if it is there and can be."""
    with contextlib.suppress(OSError):
        _target(path).unlink()


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))
