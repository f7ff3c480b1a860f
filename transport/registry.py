"""Which lane serves which URL scheme. Knows names and import paths; imports a lane only when one is opened.

Other packages add lanes through the entry point group `pdx.transports`: the entry's name is the scheme, its value a
callable like TcpLane, called as lane(url, key=..., name=...), that passes pdx.transport.conformance.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

from pdx.errors import UnknownTransport
from pdx.transport.api import Lane

ENTRY_POINT_GROUP = "pdx.transports"
BUILT_IN = {"tcp": "pdx.transport.tcp:TcpLane"}
ABSENT = {
    "loopback": "lives inside one process: use LoopbackNet.open_lane()",
    "nixl": "is not built yet",
    "ucx": "is not built yet",
}


def open_lane(url: str, *, key: bytes | None, name: str) -> Lane:
    """The lane that `url` asks for, bound and listening. `name` labels its threads.

    Raises UnknownTransport for other schemes, ConfigError if the address cannot work.
    """
    return _factory(url.partition("://")[0])(url, key=key, name=name)


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
