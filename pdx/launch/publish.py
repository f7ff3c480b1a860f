"""JSON files that tell others where something listens: written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdx.whole import write_whole


def publish(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path` in one step."""
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
