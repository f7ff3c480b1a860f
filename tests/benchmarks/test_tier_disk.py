from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tier_disk
from pdx.tiers.disk import DiskTier
from pdx.tiers.tier import Read, Write


def test_quick_runs_and_writes_its_figures(tmp_path: Path) -> None:
    """Whether the bar holds says nothing here: other tests are at work."""
    tier_disk.main(["--quick", "--folder", str(tmp_path), "--json", str(tmp_path / "result.json")])
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    for depth in (1, tier_disk.READERS):
        arms = figures[f"depth {depth}"]
        assert all(arms[arm]["gb_s"] > 0 for arm in ("bare write", "tier write", "bare read", "tier read"))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


class OneForAll(DiskTier):
    """Whatever is asked for, the same block comes."""

    def submit(self, request: Write | Read) -> int | None:
        return super().submit(replace(request, key=tier_disk.key_of(0)) if isinstance(request, Read) else request)


class Elsewhere(DiskTier):
    """Says that a block is there, and has put it into memory that nobody knows."""

    def submit(self, request: Write | Read) -> int | None:
        if isinstance(request, Read):
            request = replace(request, pages=[memoryview(bytearray(len(page))) for page in request.pages])
        return super().submit(request)


@pytest.mark.parametrize("broken", [OneForAll, Elsewhere])
def test_a_tier_that_brings_another_block_or_none_fails(
    broken: type[DiskTier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_disk, "DiskTier", broken)
    bench = tier_disk.Bench(tmp_path, blocks=3)
    bench.tier_write(2)
    with pytest.raises(AssertionError, match="other bytes came back"):
        bench.tier_read(2)
