from __future__ import annotations

import itertools
from typing import get_args

import pytest

from pdx.buffer.lease import MOVES, Lease, LeaseEvent, LeaseState, Owner
from pdx.errors import IllegalTransition


def new_lease() -> Lease:
    return Lease(lease_id=3, owner=Owner(kind="wire", name="host-b"), slots=(), expires_at=30.0)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(LeaseState, get_args(LeaseEvent))))
def test_every_event_in_every_state(state: LeaseState, event: LeaseEvent) -> None:
    lease = new_lease()
    lease.state = state
    if (state, event) in MOVES:
        lease.on(event)
        assert lease.state is MOVES[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event} of <Lease 3 {state}"):
            lease.on(event)
        assert lease.state is state


def test_renewal_never_shortens() -> None:
    lease = new_lease()
    assert lease.renew(20.0)
    assert lease.expires_at == 30.0
    assert lease.renew(40.0)
    assert lease.expires_at == 40.0


@pytest.mark.parametrize("state", [LeaseState.QUARANTINED, LeaseState.ENDED])
def test_a_lost_right_does_not_come_back(state: LeaseState) -> None:
    lease = new_lease()
    lease.state = state
    assert not lease.renew(99.0)
    assert (lease.state, lease.expires_at) == (state, 30.0)


def test_repr() -> None:
    assert repr(new_lease()) == "<Lease 3 live: wire host-b, 0 slots>"
