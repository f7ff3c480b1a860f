"""Which lane serves which URL scheme, and which of them a daemon opens. Imports a lane only when one is opened.

Other packages add lanes through the entry point group `pdx.transports`: the entry's name is the scheme, its value a
callable like TcpLane, called as lane(url, key=..., name=...), that passes pdx.transport.conformance. A daemon opens one
when its operator names it. One that was written for another contract than ours is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

from pdx.addresses import authority
from pdx.errors import ConfigError, UnknownTransport
from pdx.members import DEVICES_MAX, LaneOffer
from pdx.transport.api import CONTRACT, Lane, OverDevices
from pdx.transport.choice import AUTO, TCP
from pdx.transport.rdma import Rdma
from pdx.transport.tls import LaneTls

ENTRY_POINT_GROUP = "pdx.transports"
BUILT_IN = {
    "nixl": "pdx.transport.nixl:NixlLane",
    "tcp": "pdx.transport.tcp:TcpLane",
    "ucx": "pdx.transport.ucx:UcxLane",
}
ENCRYPTING = ("tcp",)
# Where there is RDMA, the first of them that works. Two copies of UCX in a process would be two owners of each device.
OVER_RDMA = ("nixl", "ucx")

OpenLane = Callable[[str], Lane]  # of this URL; raises as open_lane() does


def open_lane(url: str, *, key: bytes | None, name: str, tls: LaneTls | None = None) -> Lane:
    """The lane that `url` asks for, bound and listening. `name` labels its threads; `tls` is for lanes that encrypt.

    Raises UnknownTransport for other schemes, for those whose library is not installed, naming the extra, and for lanes
    of another contract; ConfigError if the address cannot work.
    """
    scheme = url.partition("://")[0]
    if tls is not None and scheme not in ENCRYPTING:
        raise ConfigError(f"{scheme}:// does not encrypt, and TLS is asked for: only {', '.join(ENCRYPTING)} does")
    lane = _factory(scheme)(url, key=key, name=name, **({} if tls is None else {"tls": tls}))
    theirs = getattr(lane, "contract", None)
    if theirs != CONTRACT:
        lane.abort()
        raise UnknownTransport(
            f"lane {scheme!r} was written for transport contract {theirs}, and this pdx has {CONTRACT}: its package "
            "must be of another version"
        )
    return lane


def open_lanes(
    host: str, *, port: int = 0, transport: str, require_rdma: bool, rdma: Rdma, open_one: OpenLane
) -> tuple[list[Lane], list[str]]:
    """A daemon's lanes, best first, and why it has no better ones. tcp is always among them, unless RDMA is required.

    `port`: of the first, and the one after it of the second; 0: any that are free.

    Raises, and leaves nothing open, UnknownTransport or ConfigError if what the operator asks for can't be had.
    """
    lanes: list[Lane] = []
    reasons: list[str] = []

    def opened(scheme: str) -> Lane:
        return open_one(f"{scheme}://{authority(host, port + len(lanes) if port else 0)}")

    try:
        if transport == AUTO:
            lanes += _first_over_rdma(rdma, opened, reasons)
        else:
            lanes.append(opened(transport))
        if require_rdma:
            _check_rdma(lanes, rdma, reasons)
        elif transport != TCP:
            lanes.append(opened(TCP))
    except BaseException:
        for lane in lanes:
            lane.abort()
        raise
    return lanes, reasons


def offer_of(lane: Lane) -> LaneOffer:
    """What peers are told of it."""
    devices = list(lane.devices) if isinstance(lane, OverDevices) else []
    return LaneOffer(endpoint=lane.endpoint, devices=devices[:DEVICES_MAX])


def check_known(transport: str) -> None:
    """Raises UnknownTransport, as a daemon would at its start, unless an operator may ask for this. Opens nothing."""
    if transport != AUTO and transport not in known_schemes():
        raise _unknown(transport)


def known_schemes() -> list[str]:
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))})


def _first_over_rdma(rdma: Rdma, opened: Callable[[str], Lane], reasons: list[str]) -> list[Lane]:
    if not rdma.devices:
        reasons.append(rdma.lack)
        return []
    for scheme in OVER_RDMA:
        try:
            return [opened(scheme)]
        except (UnknownTransport, ConfigError) as error:
            reasons.append(str(error))
    return []


def _check_rdma(lanes: list[Lane], rdma: Rdma, reasons: list[str]) -> None:
    if not lanes:
        raise ConfigError(f"require_rdma can't be met: {', '.join(reasons)}")
    if not offer_of(lanes[0]).devices:
        lack = rdma.lack or f"the {lanes[0].scheme} lane uses none"
        raise ConfigError(f"require_rdma can't be met: {lack}")


def _factory(scheme: str) -> Callable[..., Lane]:
    if scheme in BUILT_IN:
        module_name, _, attribute = BUILT_IN[scheme].partition(":")
        factory: Callable[..., Lane] = getattr(import_module(module_name), attribute)
        return factory
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=scheme):
        try:
            loaded: Callable[..., Lane] = entry.load()
        except ImportError as error:
            raise UnknownTransport(f"lane {scheme!r} of {entry.value!r} cannot be imported: {error}") from error
        return loaded
    raise _unknown(scheme)


def _unknown(scheme: str) -> UnknownTransport:
    return UnknownTransport(f"no lane for scheme {scheme!r}; known: {', '.join(known_schemes())}")
