"""What a daemon is called: by its host and run directory, for people, and by chance, so that each life has its own."""

from __future__ import annotations

import re
import secrets
import socket
from pathlib import Path

HOST_CHARS_MAX, FOLDER_CHARS_MAX = 38, 12  # with what chance adds, 64: verbs.HandoffView takes no longer name


def daemon_name(run_dir: Path) -> str:
    """E.g. gpu7:pdx/3fa2c1d09e44. What stands before the slash is the next life's too: see `members.host_of`."""
    host = _plain(socket.gethostname().partition(".")[0])
    # Of a pod's long name the end is what no other has.
    return f"{host[-HOST_CHARS_MAX:]}:{_plain(run_dir.name)[-FOLDER_CHARS_MAX:]}/{secrets.token_hex(6)}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)
