"""The lanes of a daemon: which one a handoff takes, and for how long one that failed is left alone.

A lane that is lost to a peer rests: the pair's next handoffs take another. When its pause is over one handoff tries it;
the others follow when that one has settled. Pauses begin at REST_FIRST_S and double with each loss, up to REST_MAX_S.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdx.transport.api import Lane, Region
from pdx.transport.choice import AUTO, Choice, choose
from pdx.transport.registry import offer_of
from pdx.wire import DaemonRef

LOCAL = Choice("", "local", (), "same daemon")
REST_FIRST_S = 5.0
REST_MAX_S = 300.0
PEERS_MAX = 1024  # remembered; each is some 500 bytes

log = logging.getLogger("pdxd")


@dataclass(eq=False)
class Route:
    """What one handoff takes, from its RESERVE to its end. Without a lane: both halves are in this daemon."""

    choice: Choice
    peer: str = ""  # its daemon id
    lane: Lane | None = None
    region: Region | None = None
    losses: int = 0  # of this lane to this peer, before
    channel: int = -1  # not connected yet

    @property
    def scheme(self) -> str:
        return self.choice.scheme


@dataclass
class Rest:
    """One endpoint of a peer's that was lost."""

    losses: int = 0
    until: float = 0.0
    tried_by: Route | None = None


@dataclass
class Peer:
    ref: DaemonRef
    choice: Choice | None = None  # the last one
    rests: dict[str, Rest] = field(default_factory=dict)  # by endpoint


class Lanes:
    """Owned by the control thread."""

    def __init__(
        self,
        lanes: Sequence[tuple[Lane, Region]],
        *,
        me: str,
        counters: Counter[str],
        transport: str = AUTO,
        require_rdma: bool = False,
        absent: Sequence[str] = (),
    ) -> None:
        """`lanes`: best first. `me`: this daemon's id. `absent`: why there are no better ones."""
        self._lanes = {lane.scheme: (lane, region) for lane, region in lanes}
        self._offers = [offer_of(lane) for lane, _ in lanes]
        self._me = me
        self._counters = counters
        self._transport = transport
        self._require_rdma = require_rdma
        self._absent = tuple(absent)
        self._peers: OrderedDict[str, Peer] = OrderedDict()  # by daemon id; who was chosen for last comes last

    def route(self, to: DaemonRef, now: float, *, before: Route | None = None) -> Route:
        """For a handoff to this daemon. taken() may follow, ended() must. Raises UnknownTransport if there is no lane.

        `before`: what it was given when it last asked, which it keeps unless that lane was lost since.
        """
        if before is not None:
            rest = self._rest(before)
            if before.losses == (rest.losses if rest is not None else 0):
                return before
            self.ended(before, proved=False)
        if to.daemon_id == self._me:
            return Route(LOCAL)
        peer = self._peer(to)
        choice = choose(
            self._offers, to.lanes, transport=self._transport, require_rdma=self._require_rdma,
            resting=self._resting(peer, now), absent=self._absent,
        )  # fmt: skip
        if choice != peer.choice:
            peer.choice = choice
            devices = f" over {', '.join(choice.devices)}" if choice.devices else ""
            log.info("lane to daemon %s: %s%s (%s)", to.daemon_id, choice.endpoint, devices, choice.reason)
        lane, region = self._lanes[choice.scheme]
        rest = peer.rests.get(choice.endpoint)
        route = Route(choice, to.daemon_id, lane, region, losses=rest.losses if rest is not None else 0)
        if rest is not None and rest.tried_by is None and now >= rest.until:
            rest.tried_by = route
        return route

    def taken(self, route: Route) -> None:
        """The handoff has what it needs here, and names this lane to its peer."""
        self._counters[f"handoffs_by_{route.scheme}"] += 1

    def region(self, scheme: str) -> Region | None:
        """Where windows for puts by this lane are opened; None: we have no such lane."""
        found = self._lanes.get(scheme)
        return found[1] if found is not None else None

    def ended(self, route: Route, *, proved: bool) -> None:
        """The handoff is over. `proved`: bytes went this way, and the peer has checked them."""
        rest = self._rest(route)
        if rest is None:
            return
        if proved and rest.losses == route.losses:
            del self._peers[route.peer].rests[route.choice.endpoint]
        elif rest.tried_by is route:
            rest.tried_by = None

    def lost(self, scheme: str, endpoint: str, reason: str, now: float) -> None:
        """A channel of ours broke."""
        self._counters[f"lanes_lost_{scheme}"] += 1
        # A late handle may name an earlier life of a daemon: all that offer the endpoint are charged, the living too.
        for peer in [p for p in self._peers.values() if any(o.endpoint == endpoint for o in p.ref.lanes)]:
            rest = peer.rests.setdefault(endpoint, Rest())
            rest.losses += 1
            rest.tried_by = None
            pause_s = min(REST_MAX_S, REST_FIRST_S * 2.0 ** min(rest.losses - 1, 16))
            rest.until = now + pause_s
            log.warning(
                "lane %s to daemon %s is lost: %s; for %g s its handoffs take another, if there is one",
                scheme, peer.ref.daemon_id, reason, pause_s,
            )  # fmt: skip

    def forget(self, control: str) -> None:
        """The daemon at this control endpoint is gone. Whoever comes back is another one."""
        for name in [name for name, peer in self._peers.items() if peer.ref.control == control]:
            del self._peers[name]

    def describe(self, now: float) -> dict[str, Any]:
        """For people and metrics."""
        return {
            "here": [msgspec.to_builtins(offer) for offer in self._offers],
            "why_no_better": list(self._absent),
            "peers": {name: self._described(peer, now) for name, peer in self._peers.items()},
        }

    def _described(self, peer: Peer, now: float) -> dict[str, Any]:
        return {
            "lane": peer.choice.endpoint if peer.choice else "",
            "devices": list(peer.choice.devices) if peer.choice else [],
            "reason": peer.choice.reason if peer.choice else "",
            "resting": {
                endpoint: {"losses": rest.losses, "for_s": round(max(0.0, rest.until - now), 1)}
                for endpoint, rest in peer.rests.items()
            },
        }

    def _rest(self, route: Route) -> Rest | None:
        """None: this endpoint was not lost, or has proved itself since."""
        peer = self._peers.get(route.peer)
        return peer.rests.get(route.choice.endpoint) if peer is not None else None

    def _peer(self, ref: DaemonRef) -> Peer:
        peer = self._peers.get(ref.daemon_id)
        if peer is None:
            peer = self._peers[ref.daemon_id] = Peer(ref)
            if len(self._peers) > PEERS_MAX:
                del self._peers[next(iter(self._peers))]
        self._peers.move_to_end(ref.daemon_id)
        return peer

    def _resting(self, peer: Peer, now: float) -> Collection[str]:
        return [endpoint for endpoint, rest in peer.rests.items() if now < rest.until or rest.tried_by is not None]
