"""What is UCX's own: in which order a peer's things are given back."""

from __future__ import annotations

from functools import partial

import pytest
from held_fabric import two_of, wait_until
from lane_pairs import needing

from pdx.errors import PeerGone
from pdx.transport.api import Copy
from pdx.transport.fabric import Memory, Transfer, host_memory
from pdx.transport.ucx import UcxFabric

HALF = 1 << 15


@pytest.mark.parametrize("scheme", [pytest.param("ucx", marks=needing("ucx"))])
def test_a_peer_s_keys_outlive_what_uses_them(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with two_of(partial(UcxFabric, emulated=True), 2 * HALF) as (near, far, memory):
        peer = near.add_peer(far.metadata())
        transfer = near.write(peer, source=memory, target=memory, copies=[Copy(0, HALF, HALF)])
        endpoint, ucp = near._peers[peer].endpoint, near._ucp
        forget, alive = ucp.forget, []
        monkeypatch.setattr(ucp, "forget", lambda rkey: (alive.append(endpoint.alive), forget(rkey)))
        with monkeypatch.context() as held:
            held.setattr(ucp, "is_over", lambda _: False)
            assert not near.drop_peer(peer, [transfer])
            assert alive == [] and transfer in near._flushes
            with pytest.raises(PeerGone):
                near.write(peer, source=memory, target=Memory(memory.address, 1), copies=[])
        wait_until(lambda: near.drop_peer(peer, [transfer]))
        assert alive == [False] and not near._flushes
        assert near.drop_peer(peer, [])
        again = near.add_peer(far.metadata())
        done: Transfer = near.write(again, source=memory, target=memory, copies=[Copy(0, HALF, HALF)])
        wait_until(lambda: near.is_done(done))
        assert near.drop_peer(again, [])
        assert alive == [False, False]


@pytest.mark.parametrize("scheme", [pytest.param("ucx", marks=needing("ucx"))])
def test_a_channel_that_ends_leaves_the_others_to_its_peer_alone(scheme: str) -> None:
    with two_of(partial(UcxFabric, emulated=True), 2 * HALF) as (near, far, memory):
        old, new = near.add_peer(far.metadata()), near.add_peer(far.metadata())
        assert old != new, "a reconnect gets an endpoint of its own"
        before = near.write(new, source=memory, target=memory, copies=[Copy(0, HALF, HALF)])
        assert near.drop_peer(old, [])
        after = near.write(new, source=memory, target=memory, copies=[Copy(0, HALF, HALF)])
        for transfer in (before, after):
            wait_until(lambda transfer=transfer: near.is_done(transfer))  # type: ignore[misc]


@pytest.mark.parametrize("scheme", [pytest.param("ucx", marks=needing("ucx"))])
def test_what_a_peer_registers_later_is_reached_by_the_same_name(scheme: str) -> None:
    near, far, other = (UcxFabric(emulated=True) for _ in range(3))
    try:
        views = [memoryview(bytearray(HALF)) for _ in range(2)]
        first, later = (host_memory(view) for view in views)
        near.register(first)
        far.register(first)
        peer = near.add_peer(far.metadata())
        far.register(later)
        with pytest.raises(PeerGone):
            near.write(peer, source=first, target=later, copies=[Copy(0, 0, 1)])
        near.update_peer(peer, far.metadata())
        transfer = near.write(peer, source=first, target=later, copies=[Copy(0, 0, 1)])
        wait_until(lambda: near.is_done(transfer))
        with pytest.raises(PeerGone, match="another one"):
            near.update_peer(peer, other.metadata())
    finally:
        for fabric in (near, far, other):
            fabric.close()
