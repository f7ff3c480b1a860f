"""Disks without room, on real file systems: a small tmpfs in a mount namespace of its own where we may make one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("full_disk.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}


def may_mount() -> list[str]:
    """How to get a mount namespace here: as root, or as the root of a user namespace. Empty if not at all."""
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            if subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0:
                return command
        except OSError:
            continue
    return []


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("how", "name"), [("full", "ENOSPC"), ("read-only", "EROFS")])
def test_a_real_file_system_without_room(tmp_path: Path, how: str, name: str) -> None:
    namespace = may_mount()
    if not namespace:  # what can be had without any right; `test_disk` injects the errors themselves
        how, name, shell = "limited", "EFBIG", 'exec "$2" "$3" "$1" "$4"'
    else:
        shell = 'mount -t tmpfs -o size=4m,mode=0700 pdx-test "$1" && exec "$2" "$3" "$1" "$4"'
    command = [*namespace, "sh", "-c", shell, "sh", str(tmp_path), sys.executable, str(SCRIPT), how]
    assert name in run(command)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    assert "EFBIG" in run([sys.executable, str(SCRIPT), str(tmp_path), "limited"])
