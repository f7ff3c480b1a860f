"""The invariants bite: whoever leaves out one of the design's precautions is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.simulate.breaks import BREAKS
from benchmarks.simulate.simulator import run_episode
from benchmarks.simulate.worker import fault_of

EPISODES_MAX = 40
CAUGHT_AS = {
    "quarantine": {"unsafe"},
    "generation": {"wrong"},
    "checksum": {"wrong"},
    "commit": {"unsafe", "wrong"},
    "tail": {"wrong"},
    "budgets": {"late", "leaked"},
    "fence": {"unsafe"},
    "window": {"unsafe"},
    "hold": {"unsafe"},
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_naive_variant_is_caught(name: str) -> None:
    outcomes = (run_episode(seed, handoffs=100, parts=BREAKS[name]) for seed in range(EPISODES_MAX))
    caught = next((outcome for outcome in outcomes if outcome.finding), None)
    assert caught is not None, f"{EPISODES_MAX} episodes without {name}, and nothing was noticed"
    assert caught.kind in CAUGHT_AS[name], caught.finding
    assert "TypeError" not in caught.finding, "the variant itself is broken"
    assert caught.trace


def test_the_generation_check_alone_keeps_unpinned_reads_right() -> None:
    """The control of `generation`: the same careless daemon, and engines that look at generations."""
    parts = replace(BREAKS["generation"], fault=fault_of)
    refused = 0
    for seed in range(3):
        outcome = run_episode(seed, handoffs=100, parts=parts)
        assert outcome.kind not in ("wrong", "unsafe"), outcome.finding
        refused += outcome.counts.get("pages refused for their generation", 0)
    assert refused
