"""The house rules that a machine can check: layers, links, sizes, imports, and pages that agree with the code."""

from __future__ import annotations

import ast
import enum
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from markdown_tables import ROOT, moves_under, rows_under

FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 70
CODE = ("pdx", "transport", "router", "benchmarks", "tests")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".cu", ".cuh", ".sh", ".yml", ".yaml", ""}
HEAVY = ("torch", "vllm", "transformers", "aiohttp", "numpy", "zmq")
PROGRAMS = (
    "pdx.cli", "pdx.launch.serve", "pdx.launch.up", "pdx.commands.kv", "pdx.commands.drain", "pdx.commands.bench",
    "pdx.commands.check", "pdx.commands.top", "pdx.daemon.main", "pdx.router.main",
)  # fmt: skip
UNSAFE = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}


def python_files() -> list[Path]:
    """Ours, each once: the links inside pdx/ are not followed."""
    return sorted(
        Path(folder) / name
        for top in CODE
        for folder, _, names in os.walk(ROOT / top)
        for name in names
        if name.endswith(".py")
    )


def text_files() -> Iterator[Path]:
    yield from python_files()
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and path.suffix in TEXT_SUFFIXES:
            yield path
    for folder in ("cuda", "scripts", ".ci"):
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.is_file())


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_links_point_to_the_real_folders() -> None:
    for name in ("transport", "router", "cuda"):
        link = ROOT / "pdx" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_cuda_does_not_shadow_nvidias_package() -> None:
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_layers() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["transport", "router"])
def test_top_level_names_are_refused(name: str) -> None:
    done = run_python(f"import {name}")
    assert done.returncode != 0
    assert f"pdx.{name}" in done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import pdx",
        *(f"from {name} import main\ntry: main(['--help'])\nexcept SystemExit: pass" for name in PROGRAMS),
    ],
)
def test_help_loads_nothing_heavy(code: str) -> None:
    done = run_python(f"{code}\nimport sys; print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_has_examples() -> None:
    for module in PROGRAMS:
        assert "examples:" in run_python(f"from {module} import main; main(['--help'])").stdout, module


def test_files() -> None:
    wrong = [f"{named(path)}: {what}" for path in python_files() for what in wrong_with(path)]
    assert not wrong, "\n".join(wrong)


def wrong_with(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8")
    is_test = path.is_relative_to(ROOT / "tests")
    if source.count("\n") > FILE_LINES_MAX:
        yield "too long: look for the noun that wants its own file"
    tree = ast.parse(source)
    if source.strip() and not is_test and not ast.get_docstring(tree):
        yield "a module says what it owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX:
                yield f"{node.name} has {lines} lines"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            # Tests may: vLLM pickles our metadata between its processes, and they check that it can.
            if not is_test and (unsafe := UNSAFE & imported_names(node)):
                yield f"line {node.lineno}: {unsafe}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("eval", "exec"):
                yield f"line {node.lineno}: {node.func.id}"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: a bare except"


def test_no_machine_paths_and_no_promises() -> None:
    machine = re.compile("|".join(("/wo" + r"rk/", "/tmp/" + r"w\b", "/opt/" + "pypi")))
    promise = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"{named(path)}:{number}: {line}"
            assert not machine.search(line), where
            assert path.suffix != ".py" or not promise.search(line), where


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_style_and_types(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:]


def test_page_agrees_with_slot_states() -> None:
    from pdx.buffer.slots import MOVES

    assert moves_under("Slot states") == plain(MOVES)


def test_page_agrees_with_lease_states() -> None:
    from pdx.buffer.lease import MOVES

    assert moves_under("Lease states") == plain(MOVES)


def test_page_agrees_with_sending_states() -> None:
    from pdx.handoff.states import SENDING

    assert moves_under("Handoff states, sending side (prefill's pdxd)") == plain(SENDING)


def test_page_agrees_with_receiving_states() -> None:
    from pdx.handoff.states import RECEIVING

    assert moves_under("Handoff states, receiving side (decode's pdxd)") == plain(RECEIVING)


def test_page_agrees_with_journey_states() -> None:
    from pdx.router.request.states import MOVES

    shown = {}
    for state, _, goes_on, ends_by in rows_under("Journey states (router)"):
        for move in filter(None, goes_on.split(", ")):
            event, _, after = move.partition(" → ")
            shown[state, event] = after
        shown.update({(state, event): "ended" for event in ends_by.split(", ")})
    assert shown == MOVES


def test_page_agrees_with_breaker_states() -> None:
    from pdx.router.standing.breaker import MOVES

    assert moves_under("Circuit breakers") == MOVES


def test_page_agrees_with_tier_states() -> None:
    from pdx.tiers import health, ledger

    assert moves_under("Tier health") == plain(health.MOVES)
    assert moves_under("Tier entries") == plain(ledger.MOVES)


def plain(moves: Mapping[tuple[enum.Enum, str], enum.Enum]) -> dict[tuple[str, str], str]:
    return {(state.value, event): after.value for (state, event), after in moves.items()}


def imported_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    return {alias.name.split(".")[0] for alias in node.names}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
