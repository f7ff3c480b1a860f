"""`pdx serve` and `pdx up` as processes, with engines that compute nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from markdown_tables import ROOT

FAKE_ENGINE = Path(__file__).parent / "fake_vllm"


@contextmanager
def pdx(*words: str) -> Iterator[subprocess.Popen[str]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PDX_", "VLLM_"))}
    with subprocess.Popen(
        [sys.executable, "-m", "pdx.cli", *words], cwd=ROOT, env={**env, "PYTHONPATH": str(FAKE_ENGINE)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()  # its guards then end what it has started


def read_until(process: subprocess.Popen[str], *words: str, count: int = 1) -> list[str]:
    """Lines up to the `count`-th that holds all words."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        count -= all(word in line for word in words)
        if not count:
            return lines
    raise AssertionError(f"ended early: {lines}")
