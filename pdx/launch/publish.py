"""JSON files that tell others where something listens: written whole or not at all, and not there before or after."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdx.whole import remove, write_whole


@contextmanager
def published(path: Path | None) -> Iterator[None]:
    """While what `publish` tells may be true. Who waits for the file must not read what an earlier run has left."""
    if path is None:
        yield
        return
    remove(path)
    try:
        yield
    finally:
        remove(path)


def publish(path: Path, value: dict[str, Any], *, say: Callable[[str], None]) -> None:
    """Writes `value` to `path` in one step. What serves goes on if that can't be."""
    try:
        write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
    except OSError as error:
        say(f"nothing is published in {path}: {error.strerror or error}")
