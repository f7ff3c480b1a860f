"""Every decoder survives anything: hypothesis bends right frames. `pdx bench fuzz` does it a million times each."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
