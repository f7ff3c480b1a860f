from __future__ import annotations

import json
from pathlib import Path

from benchmarks import eviction
from pdx.buffer.policies import POLICIES


def test_quick_says_what_the_default_rests_on(tmp_path: Path) -> None:
    assert eviction.main(["--quick", "--json", str(tmp_path / "result.json")]) == 0
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert all(figures[trace].keys() == POLICIES.keys() for trace in eviction.TRACES)
