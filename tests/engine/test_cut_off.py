"""A pdxd that lives and has closed an engine's ZeroMQ connection, as for a frame that is too large, and such frames."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from daemon.fleet import DEADLINE_S, Fleet, fleet_in, until
from torch_engine import Model, Request, TorchEngine
from torch_peer import TorchPeer

from pdx.errors import TooLarge
from pdx.handoff.handle import TransferHandle, mint
from pdx.wire import FRAME_BYTES_MAX, Budgets, Renew


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with fleet_in(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def peer(fleet: Fleet) -> Iterator[TorchPeer]:
    peer = TorchPeer(TorchEngine(Model(), blocks=512), fleet.daemon().config, "both", "both", offload="all")
    yield peer
    peer.close()


def send(fleet: Fleet, peer: TorchPeer, name: str, first_token: int) -> dict[str, object] | None:
    """What the reply of a request says that prefills for its own engine."""
    (daemon,) = fleet.daemons
    handle = TransferHandle(
        handoff_id=os.urandom(16), attempt=1, prefill_engine="both", decode_engine="both", prefill_daemon=daemon.ref,
        decode_daemon=daemon.ref, budgets=Budgets(), issued_unix_s=time.time(),
    )  # fmt: skip
    request = peer.send(name, list(range(first_token, first_token + 30)), mint(handle, fleet.key_file.read_bytes()))
    finish(peer, request)
    return request.result


def finish(peer: TorchPeer, request: Request) -> None:
    end = time.monotonic() + DEADLINE_S
    while request.status != "finished":
        peer.engine.step()
        assert time.monotonic() < end


def test_an_engine_whose_connection_was_closed_attaches_again(fleet: Fleet, peer: TorchPeer) -> None:
    assert send(fleet, peer, "before", 0) is not None
    before = peer.clients
    scheduler = before[0]
    assert scheduler is not None
    scheduler._socket.send(b"x" * (FRAME_BYTES_MAX + 1))
    until(lambda: peer.engine.step() or peer._links[0].client() is not scheduler, "noticed")
    finish(peer, peer.engine.add(Request("alone", list(range(30)))))

    def back() -> bool:
        """As of an engine that works: its workers hear of it with their steps."""
        peer.engine.step()
        return None not in peer.clients

    until(back, "all of its processes are attached again")
    after = peer.clients
    assert all(new is not old for new, old in zip(after, before, strict=True)), "the worker had to leave, too"
    (daemon,) = fleet.daemons
    assert peer.daemon_ref == daemon.ref, "to the same pdxd"
    assert send(fleet, peer, "after", 60) is not None
    daemon.wait_unleased()


def test_a_request_may_have_a_name_of_any_length(fleet: Fleet, peer: TorchPeer) -> None:
    name = "x" * (FRAME_BYTES_MAX + 1)
    assert send(fleet, peer, name, 0) is not None
    assert send(fleet, peer, name + "y", 30) is not None
    assert send(fleet, peer, "next", 60) is not None


def test_a_message_that_would_end_the_connection_is_not_sent(fleet: Fleet, peer: TorchPeer) -> None:
    scheduler = peer.clients[0]
    assert scheduler is not None
    large = Renew(handoff_ids=[bytes(FRAME_BYTES_MAX)])
    with pytest.raises(TooLarge):
        scheduler.send(large)
    link = peer._links[0]
    assert not link.send(large)
    assert link.too_large == 1
    assert send(fleet, peer, "next", 0) is not None
