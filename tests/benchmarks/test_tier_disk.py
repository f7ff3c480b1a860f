from __future__ import annotations

import json
from pathlib import Path

from benchmarks import tier_disk


def test_quick_runs_and_writes_its_figures(tmp_path: Path) -> None:
    """Whether the bar holds says nothing here: other tests are at work."""
    tier_disk.main(["--quick", "--folder", str(tmp_path), "--json", str(tmp_path / "result.json")])
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    for depth in (1, tier_disk.READERS):
        arms = figures[f"depth {depth}"]
        assert all(arms[arm]["gb_s"] > 0 for arm in ("bare write", "tier write", "bare read", "tier read"))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
