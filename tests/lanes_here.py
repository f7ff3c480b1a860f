"""Which lanes can be had on this machine, and the example package that brings one of its own."""

from __future__ import annotations

import importlib.util
import os
import tomllib
from pathlib import Path

import pytest

from pdx.transport.registry import ENTRY_POINT_GROUP

EXAMPLE = Path(__file__).parent / "transport" / "example_lane"
LIBRARY = {"nixl": "nixl", "ucx": "ucxx"}
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")


def needing(scheme: str) -> list[pytest.MarkDecorator]:
    """Marks of a test that needs this lane."""
    if scheme == "cma":
        is_absent = PTRACE_SCOPE.exists() and PTRACE_SCOPE.read_text().strip() != "0" and os.geteuid() != 0
        return [pytest.mark.skipif(is_absent, reason="processes may not write into others here: ptrace_scope is set")]
    library = LIBRARY.get(scheme)
    if library is None:
        return []
    is_absent = importlib.util.find_spec(library) is None
    return [pytest.mark.skipif(is_absent, reason=f"{library} is not installed: pip install 'pdx-kv[{scheme}]'")]


def install_example(folder: Path) -> None:
    """What pip would leave of the example in this folder, from its pyproject.toml: `cma://` for whoever has it on its
    path."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    (folder / "cma_lane.py").write_text((EXAMPLE / "cma_lane.py").read_text())
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    information.joinpath("METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    entries = project["entry-points"][ENTRY_POINT_GROUP]
    lines = [f"[{ENTRY_POINT_GROUP}]", *(f"{name} = {value}" for name, value in entries.items())]
    information.joinpath("entry_points.txt").write_text("\n".join(lines))
