"""ARCHITECTURE.md shows the very tables that the code runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdx.handoff.states import RECEIVING, SENDING

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("Handoff states, sending side (prefill's pdxd)", SENDING),
        ("Handoff states, receiving side (decode's pdxd)", RECEIVING),
    ],
)
def test_table_in_the_document_is_the_table_in_the_code(heading: str, table: dict) -> None:
    section = ARCHITECTURE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if line.startswith("|")]
    documented = {(row[0], row[1], row[2]) for row in rows[2:]}
    assert documented == {(state.value, event, after.value) for (state, event), after in table.items()}
