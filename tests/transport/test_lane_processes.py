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
from lane_pairs import KEY, needing
from process_lane import ProcessPair

from pdx.transport import conformance
from pdx.transport.conformance_death import PROCESS_CHECKS
from pdx.transport.registry import open_lane

HERE = Path(__file__).parent
SCHEMES = [pytest.param(scheme, marks=needing(scheme)) for scheme in ("tcp", "nixl", "ucx")]
REMOTE_CHECKS = (
    conformance.check_bytes_land_exactly,
    conformance.check_concurrent,
    conformance.check_reconnect,
)
CHECKS: tuple[Callable[..., None], ...] = (*PROCESS_CHECKS, *REMOTE_CHECKS)


@contextmanager
def process_pair(scheme: str) -> Iterator[ProcessPair]:
    near = open_lane(f"{scheme}://127.0.0.1:0", key=KEY, name="near")
    try:
        pair = ProcessPair(near)
        try:
            yield pair
        finally:
            pair.abort()
    finally:
        near.abort()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes(scheme: str, check: Callable[..., None]) -> None:
    check(partial(process_pair, scheme))


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ip"), reason="needs iproute2: apt install iproute2")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_network_namespaces(scheme: str) -> None:
    if subprocess.run(
        ["unshare", "-rnm", "mount", "-t", "sysfs", "none", "/sys"], capture_output=True, timeout=30, check=False
    ).returncode:
        pytest.skip("this machine lets nobody make network namespaces")
    done = subprocess.run(
        ["unshare", "-rnm", sys.executable, str(HERE / "namespace_checks.py"), scheme],
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "UCX_TLS": "tcp"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
