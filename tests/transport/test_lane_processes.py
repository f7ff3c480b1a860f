"""Every lane with its far side in a process of its own: over loopback, and between two network namespaces.

What differs when a peer is another process is checked here, since each of them takes seconds to load its libraries.
Between the namespaces the fabrics may use nothing but the network (on one host they would write through the kernel).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from lane_pairs import KEY, needing, open_any
from process_lane import ProcessLane, ProcessPair

from pdx.errors import ConfigError
from pdx.transport import conformance
from pdx.transport.api import Copy, Lane, Span
from pdx.transport.conformance_death import PROCESS_CHECKS, check_killed_somewhere, check_killed_writer
from pdx.transport.conformance_faults import Hazard
from pdx.transport.rdma import rdma_here
from pdx.transport.registry import open_lane
from pdx.transport.side import Side, losses_of

# The rest of them takes a nixl lane, which loads for seconds, to `make prove`. So does the killed writer: where UCX
# emulates writes, its own thread answered that with abort() once, in hundreds: a pdxd's end, which the others survive.
NIXL_CHECKS = (conformance.check_bytes_land_exactly,)
HERE = Path(__file__).parent
SCHEMES = [pytest.param(scheme, marks=needing(scheme)) for scheme in ("tcp", "nixl", "ucx")]
REMOTE_CHECKS = (
    conformance.check_bytes_land_exactly,
    conformance.check_concurrent,
    conformance.check_reconnect,
)
CHECKS: tuple[Callable[..., None], ...] = (*PROCESS_CHECKS, *REMOTE_CHECKS)


def open_near(scheme: str) -> Lane:
    """Ours, if it is all Python. Native code may take its process along, and what it says then is to be seen."""
    url = f"{scheme}://127.0.0.1:0"
    return open_any(url, key=KEY, name="near") if scheme == "tcp" else ProcessLane(url, checked_by="sender")


@contextmanager
def process_pair(scheme: str) -> Iterator[ProcessPair]:
    near = open_near(scheme)
    try:
        pair = ProcessPair(near)
        try:
            yield pair
        finally:
            pair.abort()
    finally:
        near.abort()


def cases() -> Iterator[object]:
    """Every lane, every check. What UCX does with a killed writer where it emulates writes is why it refuses those."""
    for scheme in ("tcp", "nixl", "ucx"):
        for check in CHECKS:
            if (scheme, check) != ("ucx", check_killed_writer):
                name = f"{scheme}-{check.__name__.removeprefix('check_')}"
                # The ucx lane is refused without RDMA: what it does on emulated writes is part of `make prove`.
                later = scheme == "ucx" or (scheme == "nixl" and check not in NIXL_CHECKS)
                tier = [pytest.mark.prove] if later else []
                yield pytest.param(scheme, check, id=name, marks=[*needing(scheme), *tier])


@pytest.mark.skipif(bool(rdma_here().devices), reason="UCX emulates nothing here")
@pytest.mark.parametrize("scheme", [pytest.param("ucx", marks=needing("ucx"))])
def test_no_lane_that_dies_with_its_peer(scheme: str) -> None:
    with pytest.raises(ConfigError, match="needs RDMA"):
        open_lane(f"{scheme}://127.0.0.1:0", key=KEY, name="near")


@pytest.mark.parametrize(("scheme", "check"), list(cases()))
def test_two_processes(scheme: str, check: Callable[..., None]) -> None:
    check(partial(process_pair, scheme))


@pytest.mark.parametrize("seed", range(100, 104))
def test_a_few_kills(seed: int) -> None:
    check_killed_somewhere(partial(process_pair, "tcp"), seed=seed)


@pytest.mark.prove
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_many_kills(scheme: str) -> None:
    """Beside the faults of the network, 500 a lane, of which UCX's emulated writes would not survive a kill."""
    for seed in range(100):
        try:
            check_killed_somewhere(partial(process_pair, scheme), seed=seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ip"), reason="needs iproute2: apt install iproute2")
@pytest.mark.parametrize(
    "scheme", [SCHEMES[0], *(pytest.param(*s.values, marks=[*s.marks, pytest.mark.prove]) for s in SCHEMES[1:])]
)
def test_two_network_namespaces(scheme: str) -> None:
    if subprocess.run(
        ["unshare", "-rnm", "mount", "-t", "sysfs", "none", "/sys"], capture_output=True, timeout=30, check=False
    ).returncode:
        pytest.skip("this machine lets nobody make network namespaces")
    done = subprocess.run(
        ["unshare", "-rnm", sys.executable, str(HERE / "namespace_checks.py"), scheme],
        env={**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}", "UCX_TLS": "tcp"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("scheme", ["tcp", pytest.param("nixl", marks=needing("nixl"))])
def test_a_link_that_breaks_leaves_no_connection_behind(scheme: str) -> None:
    with process_pair(scheme) as pair:
        near, far, held = Side(pair.near, seed=1), Side(pair.far, seed=2), []
        for number in range(6):
            window, notice = far.region.open_window([Span(0, 10)]), b"%d" % number
            with Hazard(far.lane.endpoint, "reset", after_bytes=1 << 40) as way:
                channel = near.lane.connect(way.endpoint)
                near.put(channel, window, [Copy(0, 0, 10)], notice=notice)
                far.wait_arrived(notice)
            near.wait("the link is lost", lambda events, channel=channel: bool(losses_of(events, channel)))
            held.append(len(os.listdir("/proc/self/fd")))
        assert held[-1] <= held[1] + 1, held
