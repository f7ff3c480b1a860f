"""What a file system gives to direct reads, by fio: the ceiling of a disk tier."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Literal

FIO_S = 300.0


def read_rate(
    file: Path, *, block_bytes: int, total_bytes: int, depth: int, order: Literal["read", "randread"]
) -> float | None:
    """Bytes per second of direct reads of a block each, `depth` under way. Makes the file if there is none.

    None where fio is not installed.
    """
    if shutil.which("fio") is None:
        return None
    command = [
        "fio", "--name=pdx", f"--filename={file}", f"--rw={order}", f"--bs={block_bytes}", "--direct=1",
        "--ioengine=libaio", f"--iodepth={depth}", f"--size={total_bytes}", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=FIO_S)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])
