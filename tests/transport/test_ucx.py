"""What is UCX's own: in which order a peer's things are given back."""

from __future__ import annotations

import pytest
from held_fabric import wait_until
from lane_pairs import needing

from pdx.errors import PeerGone
from pdx.transport.api import Copy
from pdx.transport.fabric import Memory, Transfer, host_memory
from pdx.transport.ucx import UcxFabric

HALF = 1 << 15


@pytest.mark.parametrize("scheme", [pytest.param("ucx", marks=needing("ucx"))])
def test_a_peer_s_keys_outlive_what_uses_them(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = UcxFabric(emulated=True), UcxFabric(emulated=True)
    try:
        view = memoryview(bytearray(2 * HALF))
        memory = host_memory(view)
        for fabric in (near, far):
            fabric.register(memory)
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
    finally:
        near.close()
        far.close()
