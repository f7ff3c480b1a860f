"""Every decoder survives anything: hypothesis bends right frames. `pdx bench fuzz` does it a million times each."""

from __future__ import annotations

import itertools
import json
import mmap
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import __main__ as bench
from benchmarks.fuzz.__main__ import Finding, feed
from benchmarks.fuzz.targets import Target, targets

TARGETS = [pytest.param(target, id=target.name.replace(" ", "-")) for target in targets()]


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_bent_frames(target: Target, data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from(target.seeds)))
    at = data.draw(st.integers(0, len(frame)))
    frame[at : at + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    try:
        target.feed(bytes(frame))
    except target.may_raise:
        pass


@pytest.mark.parametrize("target", TARGETS)
def test_a_thousand_accidents(target: Target) -> None:
    feed(target, random.Random(3), 1000)


@pytest.mark.parametrize("target", TARGETS)
def test_right_frames_are_taken(target: Target) -> None:
    """Else the accidents would befall frames that were refused before."""
    taken = 0
    for seed in target.seeds:
        try:
            target.feed(seed)
            taken += 1
        except target.may_raise:
            assert len(target.seeds) > 1 or target.name == "handle"
    assert taken


def test_what_a_decoder_should_not_raise_is_a_finding() -> None:
    def decode(frame: bytes) -> None:
        if b"\xc1" in frame:
            raise KeyError(frame)

    with pytest.raises(Finding, match="KeyError"):
        feed(Target("broken", (bytes(20),), decode), random.Random(1), 1000)


def test_a_quick_run_sees_a_decoder_that_keeps_256_bytes_of_each_frame(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A page for 16 frames, fresh from the kernel: memory that other tests have freed could hide it."""
    kept: list[mmap.mmap] = []
    frames = itertools.count()

    def keep(frame: bytes) -> None:
        if next(frames) % 16 == 0:
            kept.append(mmap.mmap(-1, mmap.PAGESIZE))
            kept[-1][0] = 1

    monkeypatch.setattr(bench, "targets", lambda: [Target("leaky", (bytes(20),), keep)])
    monkeypatch.setattr(sys, "argv", ["fuzz", "--quick", "--json", str(tmp_path / "result.json")])
    assert bench.main() == 1
    bars = json.loads((tmp_path / "result.json").read_text())["bars"]
    assert [bar["holds"] for bar in bars.values()] == [True, False]
