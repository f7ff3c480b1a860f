"""JSON files that tell others where something listens: written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pdx.errors import ConfigError
from pdx.whole import write_whole


def check_place(path: Path | None) -> None:
    """Raises ConfigError where `publish` could not write, which is told before anything is started."""
    if path is not None and not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--publish {path}: there is no folder {path.absolute().parent}, or it can't be written to")


def publish(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path` in one step."""
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
