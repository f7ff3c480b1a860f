"""Which lane serves which URL scheme. Knows names and import paths; imports a lane only when one is opened.

Other packages add lanes through the entry point group `pdx.transports`: the entry's name is the scheme, its value a
callable like TcpLane, called as lane(url, key=..., name=...), that passes pdx.transport.conformance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from importlib.metadata import entry_points

import msgspec

from pdx.errors import ConfigError, UnknownTransport
from pdx.transport.api import Lane
from pdx.transport.tls import LaneTls

ENTRY_POINT_GROUP = "pdx.transports"
BUILT_IN = {
    "nixl": "pdx.transport.nixl:NixlLane",
    "tcp": "pdx.transport.tcp:TcpLane",
    "ucx": "pdx.transport.ucx:UcxLane",
}
ENCRYPTING = ("tcp",)
ABSENT = {"loopback": "lives inside one process: use LoopbackNet.open_lane()"}


def open_lane(url: str, *, key: bytes | None, name: str, tls: LaneTls | None = None) -> Lane:
    """The lane that `url` asks for, bound and listening. `name` labels its threads; `tls` is for lanes that encrypt.

    Raises UnknownTransport for other schemes and for those whose library is not installed, naming the extra;
    ConfigError if the address cannot work.
    """
    scheme = url.partition("://")[0]
    if tls is None:
        return _factory(scheme)(url, key=key, name=name)
    if scheme not in ENCRYPTING:
        raise ConfigError(f"{scheme}:// does not encrypt, and TLS is asked for: only {', '.join(ENCRYPTING)} does")
    return _factory(scheme)(url, key=key, name=name, tls=tls)


class Choice(msgspec.Struct, frozen=True):
    """The lane for a pair, and in one sentence why not a better one."""

    endpoint: str
    scheme: str
    reason: str


def open_best(host: str, *, schemes: Sequence[str], key: bytes | None, name: str) -> tuple[list[Lane], list[str]]:
    """A lane of each of `schemes` (best first) that this machine has, and why it has not the others.

    Raises what the last scheme raises if none can be had. Whoever insists on a lane calls open_lane().
    """
    lanes: list[Lane] = []
    reasons: list[str] = []
    for index, scheme in enumerate(schemes):
        try:
            lanes.append(open_lane(f"{scheme}://{host}:0", key=key, name=name))
        except (UnknownTransport, ConfigError) as error:
            if not lanes and index == len(schemes) - 1:
                raise
            reasons.append(f"{scheme}: {error}")
    return lanes, reasons


def choose(ours: Sequence[str], theirs: Sequence[str], *, avoid: Collection[str] = ()) -> Choice:
    """The first of our schemes (best first) of which the peer published an endpoint that is not to be avoided.

    Raises UnknownTransport with the same reasons if there is none.
    """
    offered = {endpoint.partition("://")[0]: endpoint for endpoint in reversed(theirs)}
    reasons: list[str] = []
    for scheme in ours:
        endpoint = offered.get(scheme)
        if endpoint is None:
            reasons.append(f"the peer has no {scheme}")
        elif endpoint in avoid:
            reasons.append(f"{scheme} failed between the two")
        else:
            return Choice(endpoint, scheme, ", ".join(reasons) or "the best of ours")
    raise UnknownTransport(f"no common lane: {', '.join(reasons) or 'we have none'}; the peer offers {list(theirs)}")


def known_schemes() -> list[str]:
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))})


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
    absent = "".join(f"; {name}:// {why}" for name, why in ABSENT.items())
    raise UnknownTransport(f"no lane for scheme {scheme!r}; known: {', '.join(known_schemes())}{absent}")
