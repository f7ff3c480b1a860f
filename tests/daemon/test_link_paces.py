"""How fast puts reach peers, as it is announced."""

from __future__ import annotations

import pytest

from pdx.daemon import links as limits
from pdx.daemon.links import Links, Underway


def test_no_second_of_a_peer_is_counted_twice_and_failures_say_nothing() -> None:
    links = Links()
    assert links.rates() == []
    for end in (1.0, 2.0, 3.0):  # all were given at once: the lane sends one after the other
        links.ended(Underway("a", 100, 0.0), end, ok=True)
    links.ended(Underway("b", 100, 0.0), 0.5, ok=True)
    links.ended(Underway("a", 1 << 30, 3.0), 9.0, ok=False)
    links.ended(Underway("a", 100, 9.0), 10.0, ok=True)
    rates = {rate.daemon_id: rate.bytes_per_s for rate in links.rates()}
    assert rates == {"a": pytest.approx(100.0), "b": pytest.approx(200.0)}


def test_peers_that_were_used_long_ago_are_forgotten() -> None:
    links = Links()
    for number in range(limits.PEERS_MAX + 2):
        links.ended(Underway(f"p{number}", 1, 0.0), 1.0, ok=True)
        links.ended(Underway("p0", 1, 0.0), 1.0 + number, ok=True)
    peers = [rate.daemon_id for rate in links.rates()]
    assert len(peers) == limits.PEERS_MAX
    assert "p0" in peers and "p1" not in peers
