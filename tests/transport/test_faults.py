"""Seeded faults of the network between two lanes. `python -m benchmarks.soak` runs hundreds, of these and of kills."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from lane_pairs import KEY, SETTLE_S, OpenPair, example_fabric, needing

from pdx.transport.api import Lane
from pdx.transport.conformance_faults import FAULTS, check_fault
from pdx.transport.onesided import OneSidedLane
from pdx.transport.tcp import TcpLane

STALL_S = 0.2
SEEDS, MANY_SEEDS = range(2), range(2, 502)


def tcp(url: str) -> Lane:
    return TcpLane(url, key=KEY, name="test", stall_s=STALL_S)


def tcp_of_streams(url: str) -> Lane:
    return TcpLane(url, key=KEY, name="test", stall_s=STALL_S, streams=3)


def one_sided(url: str) -> Lane:
    return OneSidedLane(
        url, scheme="raw", key=KEY, name="test", make_fabric=example_fabric, stall_s=STALL_S, settle_s=SETTLE_S
    )


def of_a_library(url: str) -> Lane:
    if url.startswith("ucx://"):
        from pdx.transport.ucx import UcxLane

        return UcxLane(url, key=KEY, name="test", emulated=True, stall_s=STALL_S, settle_s=SETTLE_S)
    from pdx.transport.nixl import NixlLane

    return NixlLane(url, key=KEY, name="test", stall_s=STALL_S, settle_s=SETTLE_S)


@contextmanager
def pair_of(open_lane: Callable[[str], Lane], url: str) -> Iterator[OpenPair]:
    pair = OpenPair(open_lane, near=url, far=url)
    try:
        yield pair
    finally:
        pair.abort()


CASES = [
    pytest.param(partial(pair_of, open_lane, f"{scheme}://127.0.0.1:0"), fault, id=f"{name}-{fault}")
    for name, open_lane, scheme, checked_by in (
        ("tcp", tcp, "tcp", "receiver"),
        ("tcp3", tcp_of_streams, "tcp", "receiver"),
        ("raw", one_sided, "raw", "sender"),
    )
    for fault in FAULTS[checked_by]  # type: ignore[index]
]


@pytest.mark.parametrize(("make_pair", "fault"), CASES)
def test_a_fault_costs_no_more_than_it_must(make_pair: Callable[[], object], fault: str) -> None:
    for seed in SEEDS:
        check_fault(make_pair, fault=fault, seed=seed)  # type: ignore[arg-type]


@pytest.mark.prove
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scheme", [pytest.param(name, marks=needing(name)) for name in ("tcp", "nixl", "ucx")])
def test_five_hundred_faults_a_lane(scheme: str) -> None:
    """Seeds in turn over the kinds of faults; nothing is left behind by any."""
    make_pair = partial(pair_of, tcp if scheme == "tcp" else of_a_library, f"{scheme}://127.0.0.1:0")
    kinds = FAULTS["receiver" if scheme == "tcp" else "sender"]
    with make_pair():  # what a library keeps once it was used
        pass
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for seed in MANY_SEEDS:
        fault = kinds[seed % len(kinds)]
        try:
            check_fault(make_pair, fault=fault, seed=seed)
        except AssertionError as error:
            raise AssertionError(f"{fault} of seed {seed}: {error}") from error
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
