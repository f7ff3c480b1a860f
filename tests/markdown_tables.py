"""Reads tables out of our own pages, so that tests can compare them with the code."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def rows_under(heading: str, *, page: str = "ARCHITECTURE.md") -> list[list[str]]:
    """The rows of the first table under `## heading`, without its header. Raises LookupError."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    try:
        start = next(index for index, line in enumerate(lines) if line.lstrip("#") == f" {heading}")
    except StopIteration:
        raise LookupError(f"{page} has no heading {heading!r}") from None
    table: list[list[str]] = []
    for line in lines[start + 1 :]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif table or line.startswith("#"):
            break
    if len(table) < 3:
        raise LookupError(f"{page} has no table under {heading!r}")
    return table[2:]


def moves_under(heading: str) -> dict[tuple[str, str], str]:
    """A state table as {(from, event): to}."""
    return {(row[0], row[1]): row[2] for row in rows_under(heading)}
