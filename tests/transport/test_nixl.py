"""What is NIXL's own: how a process ends that has used it, and what it can't take back.

Lanes' conformance is checked with all the others.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from held_fabric import two_of, wait_until
from lane_pairs import needing

from pdx.transport import nixl
from pdx.transport.api import Copy
from pdx.transport.nixl import NixlFabric, leave_efa_out

USER = "from pdx.transport.nixl import NixlFabric; NixlFabric().close(); print('closed')"


def device(devices: Path, name: str, driver: str) -> None:
    (devices.parent / "drivers" / driver).mkdir(parents=True)
    (devices / name / "device").mkdir(parents=True)
    (devices / name / "device" / "driver").symlink_to(devices.parent / "drivers" / driver)


@pytest.mark.parametrize(("driver", "chosen"), [("", "^efa"), ("mlx5_core", "^efa"), ("efa", None)])
def test_efa_s_module_is_loaded_only_for_its_device(tmp_path: Path, driver: str, chosen: str | None) -> None:
    devices = tmp_path / "infiniband"
    if driver:
        device(devices, "rdmap0s6", driver)
    environ: dict[str, str] = {}
    leave_efa_out(environ, devices)
    assert environ.get("UCX_MODULES") == chosen


def test_the_operator_s_choice_of_modules_stands(tmp_path: Path) -> None:
    environ = {"UCX_MODULES": "ib"}
    leave_efa_out(environ, tmp_path / "infiniband")
    assert environ == {"UCX_MODULES": "ib"}


@pytest.mark.parametrize("scheme", [pytest.param("nixl", marks=needing("nixl"))])
def test_a_process_that_has_used_it_ends_well(scheme: str) -> None:
    done = subprocess.run([sys.executable, "-c", USER], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


class HeldAgent:
    """NIXL's agent, with transfers that do not end: those of a network card that repeats them."""

    def __init__(self, agent: object, in_progress: object) -> None:
        self._agent = agent
        self._in_progress = in_progress
        self.called: list[str] = []

    def getXferStatus(self, transfer: int) -> object:
        return self._in_progress

    def __getattr__(self, name: str) -> object:
        self.called.append(name)
        return getattr(self._agent, name)


@pytest.mark.parametrize("scheme", [pytest.param("nixl", marks=needing("nixl"))])
def test_a_peer_is_kept_while_it_is_written_to(scheme: str) -> None:
    """NIXL forgets what is under way to a peer that it drops, and does not end it."""
    with two_of(NixlFabric, 1 << 16) as (near, far, memory):
        peer = near.add_peer(far.metadata())
        transfer = near.write(peer, source=memory, target=memory, copies=[Copy(0, 1 << 15, 1 << 15)])
        agent = near._agent
        near._agent = held = HeldAgent(agent, near._nixl.NIXL_IN_PROG)
        assert not near.drop_peer(peer, [transfer])
        assert held.called == []
        near._agent = agent
        wait_until(lambda: near.is_done(transfer))
        assert near.drop_peer(peer, [])


@pytest.mark.parametrize("scheme", [pytest.param("nixl", marks=needing("nixl"))])
@pytest.mark.parametrize("is_broken", [False, True])
def test_a_channel_that_ends_leaves_the_others_to_its_peer_alone(
    scheme: str, is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it ended well or not: the peer is forgotten, or kept for later, when the last one ends."""
    monkeypatch.setattr(nixl, "IDLE_PEERS_MAX", 0)
    with two_of(NixlFabric, 1 << 16) as (near, far, memory):
        agent = near._agent
        peer = near.add_peer(far.metadata())
        failed = near.write(peer, source=memory, target=memory, copies=[Copy(0, 1 << 15, 1 << 15)])
        assert near.add_peer(far.metadata()) == peer
        wait_until(lambda: near.drop_peer(peer, [failed]) if is_broken else near.is_done(failed))
        if not is_broken:
            assert near.drop_peer(peer, [])
        near.update_peer(peer, far.metadata())
        near._agent = watched = HeldAgent(agent, None)
        transfer = near.write(peer, source=memory, target=memory, copies=[Copy(0, 1 << 15, 1 << 15)])
        assert "invalidateRemoteMD" not in watched.called
        near._agent = agent
        wait_until(lambda: near.is_done(transfer))
        near._agent = watched
        assert near.drop_peer(peer, [])
        assert "invalidateRemoteMD" in watched.called
