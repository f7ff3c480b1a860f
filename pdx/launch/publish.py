"""JSON files that tell others where something listens: written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def publish(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path` in one step."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
