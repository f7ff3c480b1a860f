"""Daemons that speak another version of the wire: nothing that they say is understood, and both sides are told so."""

from __future__ import annotations

import logging
from contextlib import suppress

import zmq

from pdx.errors import VersionMismatch
from pdx.router.engines.control import Control
from pdx.wire import Welcome, encode

NAMED_MAX = 4096  # daemons that are named in the log
NAME_BYTES_SHOWN = 96

_log = logging.getLogger(__name__)


class OtherVersions:
    """Whom the log has named already. Owned by the event loop."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._named: set[bytes] = set()

    async def met(self, name: bytes, error: VersionMismatch) -> None:
        """A frame that can't be read. The version is all that its sender can read of ours, so any frame tells it."""
        with suppress(zmq.ZMQError):
            await self._control.send(name, encode(Welcome()))
        if name not in self._named and len(self._named) < NAMED_MAX:
            self._named.add(name)
            who = name[:NAME_BYTES_SHOWN].decode(errors="backslashreplace")
            _log.warning("daemon %s is not heard: %s; docs/operating.md has the order of an upgrade", who, error)
