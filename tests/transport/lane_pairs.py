"""Pairs of lanes for the conformance suite, and which lanes can be had on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from lanes_here import EXAMPLE as EXAMPLE
from lanes_here import needing as needing

from pdx.transport.api import Lane
from pdx.transport.fabric import Fabric
from pdx.transport.registry import open_lane

KEY = b"0123456789abcdef"
SETTLE_S = 0.5


def open_any(url: str, *, key: bytes | None, name: str) -> Lane:
    """open_lane(), but for ucx, which refuses machines without RDMA: there it emulates writes. And without RDMA nothing
    writes for long for a process that is gone."""
    if url.startswith("nixl://"):
        from pdx.transport.nixl import NixlLane

        return NixlLane(url, key=key, name=name, settle_s=SETTLE_S)
    if url.startswith("ucx://"):
        from pdx.transport.ucx import UcxLane

        return UcxLane(url, key=key, name=name, settle_s=SETTLE_S, emulated=True)
    return open_lane(url, key=key, name=name)


class OpenPair:
    """A Pair around a function that opens one lane; a port or name given to it is an endpoint to come back to."""

    def __init__(self, open_lane: Callable[[str], Lane], *, near: str, far: str) -> None:
        self._open_lane = open_lane
        self.near = open_lane(near)
        self.far = open_lane(far)
        self._opened = [self.near, self.far]

    def kill_far(self) -> None:
        self.far.abort()

    def revive_far(self) -> Lane:
        self.far = self._open_lane(self.far.endpoint)
        self._opened.append(self.far)
        return self.far

    def abort(self) -> None:
        for lane in self._opened:
            lane.abort()


def example_fabric() -> Fabric:
    """The fabric of the example package: one-sided writes that need no library, so that lanes open in no time."""
    specification = importlib.util.spec_from_file_location("cma_lane", EXAMPLE / "cma_lane.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    fabric: Fabric = module.CmaFabric()
    return fabric
