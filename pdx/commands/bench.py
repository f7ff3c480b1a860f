"""`pdx bench`: lists the scripts in benchmarks/ and runs one. They are in a clone or an sdist, not in the wheel."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pdx

# Run by make, or imported by others; by name they run here too.
UNLISTED = ("demo", "model", "prove", "tiny")


def main(argv: list[str] | None = None) -> int:
    """Runs the named benchmark with the other arguments; lists all of them without a name."""
    arguments = sys.argv[1:] if argv is None else argv
    folder = Path(pdx.__file__).resolve().parent.parent / "benchmarks"
    scripts = _scripts(folder)
    if not scripts:
        print("pdx bench: the benchmarks are in the source tree; clone it and run this there", file=sys.stderr)
        return 2
    listed = [name for name in scripts if name not in UNLISTED]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pdx bench NAME [options]\n")
        for name in listed:
            print(f"  {name:<12} {_first_line(scripts[name])}")
        print("\nexamples:\n  pdx bench transport --quick\n  pdx bench transport --help")
        return 0
    name = arguments[0]
    if name not in scripts:
        print(f"pdx bench: no benchmark {name!r}; there are {', '.join(listed)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(folder.parent))
    sys.argv = [str(scripts[name]), *arguments[1:]]
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _scripts(folder: Path) -> dict[str, Path]:
    """Name -> file: each script and each package that can be run."""
    files = {path.stem: path for path in folder.glob("[a-z]*.py") if "\nif __name__ ==" in path.read_text("utf-8")}
    packages = {path.parent.name: path for path in folder.glob("[a-z]*/__main__.py")}
    return dict(sorted((files | packages).items()))


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
