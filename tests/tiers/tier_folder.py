"""A disk tier's folder seen from outside, and how tests open one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pdx.layout import ALIGN_BYTES
from pdx.tiers.disk import DiskTier
from pdx.tiers.faulty import FaultyFiles
from pdx.tiers.folder import FOLDER_UNITS

CAP_BYTES = 8 << 20
FOLDER_BYTES = FOLDER_UNITS * ALIGN_BYTES  # where files take whole blocks of 4 KiB

OpenTier = Callable[..., tuple[DiskTier, FaultyFiles]]


def taken_bytes(folder: Path) -> int:
    """All that a folder takes of the file system: files whole and half, and the folders themselves."""
    total = 0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            try:
                total += os.lstat(path).st_blocks * 512
            except FileNotFoundError:  # removed while we looked
                continue
    return total


def block_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9a-f][0-9a-f]/*") if path.is_file())
