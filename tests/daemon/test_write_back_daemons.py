"""Write-back in real daemons over a real disk: through their settings, and across their lives."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet import Fleet, prompt_of, until


@pytest.fixture
def fleet(unchecked_fleet: Fleet) -> Fleet:
    return unchecked_fleet


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_what_has_left_the_arena_is_hit_from_the_disk(fleet: Fleet, tmp_path: Path, eviction: str) -> None:
    daemon = fleet.daemon(
        disk=str(tmp_path / "disk"), disk_cap="64MiB", disk_write="back", eviction=eviction, low_water="0.3",
        high_water="0.5",
    )  # fmt: skip
    engine = fleet.engine(daemon, "E")
    first = prompt_of(64).hashes
    engine.keep(first)
    until(lambda: daemon.stats()["store"]["indexed_blocks"] == len(first), "they are kept")
    assert daemon.stats()["disk"]["written"] == 0, "there is room"
    others = 0
    while engine.look_up(first) and not daemon.stats()["store"]["evicted_ahead_blocks"]:
        others += 1
        engine.keep(prompt_of(64, seed=others).hashes)
    until(lambda: daemon.stats()["store"]["free_share"] >= 0.5, "room is made up to the high mark")
    daemon.wait_unleased()
    stats = daemon.stats()
    assert stats["disk"]["write_mode"] == "back"
    assert stats["disk"]["written_back_blocks"] >= stats["store"]["evicted_ahead_blocks"] > 0
    assert (stats["disk"]["lost_blocks"], stats["store"]["evicted_blocks"]) == (
        0,
        stats["store"]["evicted_ahead_blocks"],
    )
    for seed in range(others + 1):
        assert engine.look_up(prompt_of(64, seed=seed).hashes) == 4
        daemon.wait_unleased()  # what is still coming up keeps its room, and the next prompt would get less
    assert daemon.stats()["disk"]["loaded"] > 0


@pytest.mark.parametrize(("disk_flush_s", "hits"), [("5", 4), ("0", 0)])
def test_a_clean_stop_keeps_what_only_the_arena_had(fleet: Fleet, tmp_path: Path, disk_flush_s: str, hits: int) -> None:
    """With an engine attached, which is told before: it does not wait for the disk."""
    settings = {"disk": str(tmp_path / "disk"), "disk_cap": "64MiB", "disk_write": "back", "disk_flush_s": disk_flush_s}
    daemon = fleet.daemon(**settings)
    hashes = prompt_of(64).hashes
    engine = fleet.engine(daemon, "E")
    engine.keep(hashes)
    until(lambda: daemon.stats()["store"]["indexed_blocks"] == len(hashes), "they are kept")
    assert daemon.stats()["disk"]["written"] == 0
    daemon.process.terminate()
    assert daemon.process.wait(20) == 0
    successor = fleet.daemon(**settings)
    assert fleet.engine(successor, "E").look_up(hashes) == hits
    successor.wait_unleased()
