from __future__ import annotations

import pytest

from pdx.buffer.quota import Quotas


def test_without_limits_everybody_may_take_everything() -> None:
    quotas = Quotas()
    quotas.charge(b"a", 1 << 50)
    assert quotas.excess_bytes(b"a", 1 << 50) == 0
    assert not quotas.never_fits(b"a", 1 << 60)
    assert not quotas.limits_anybody


def test_a_tenant_at_its_limit_makes_room_from_its_own() -> None:
    quotas = Quotas(default_bytes=100, limits={b"b": 1000})
    quotas.charge(b"a", 90)
    quotas.charge(b"b", 900)
    assert quotas.excess_bytes(b"a", 10) == 0
    assert quotas.excess_bytes(b"a", 30) == 20
    assert quotas.never_fits(b"a", 101)
    assert not quotas.never_fits(b"b", 101)
    assert quotas.limits_anybody and Quotas(limits={b"b": 1}).limits_anybody


def test_tenants_without_bytes_leave_no_trace() -> None:
    quotas = Quotas(default_bytes=10)
    for number in range(1000):
        quotas.charge(b"%d" % number, 5)
        quotas.credit(b"%d" % number, 5)
    assert quotas.tenants() == {}
    assert repr(quotas) == "<Quotas 0 tenants, 0 bytes>"


def test_more_is_never_given_back_than_was_charged() -> None:
    quotas = Quotas()
    quotas.charge(b"a", 5)
    with pytest.raises(AssertionError, match="6 bytes given back, 5 were charged"):
        quotas.credit(b"a", 6)
    assert quotas.used_bytes(b"a") == 5
