"""Tells routers which engines this daemon serves, every second and at once on change, and hears their questions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

import zmq

from pdx.addresses import has_ipv6
from pdx.curve import lock
from pdx.daemon.holdings import HoldingsTeller
from pdx.daemon.listening import BURST
from pdx.daemon.sessions import Engine
from pdx.errors import VersionMismatch, WireError
from pdx.wire import (
    TO_DAEMON,
    Announce,
    Answer,
    Ask,
    CancelHandoff,
    DaemonRef,
    EngineLoad,
    Holdings,
    LinkRate,
    Message,
    Resync,
    Share,
    Welcome,
    decoder_of,
    encode,
)

ANNOUNCE_S = 1.0
ROUTERS_MAX = 16
SILENT_ROUTER_S = 10.0
UNNAMED_S = 60.0  # a router that no engine names for so long is none of ours any more: engines may be restarted
SEND_QUEUE_MAX = 256  # a router that reads nothing for so long learns the state anew from the next announcement

log = logging.getLogger("pdxd")

_decode = decoder_of(TO_DAEMON)


class Announcer:
    """One DEALER per router that any engine named. Owned by the control thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        me: DaemonRef,
        counters: Counter[str],
        *,
        cluster_key: bytes,
        holdings: HoldingsTeller,
    ) -> None:
        self._cluster_key = cluster_key
        self._holdings = holdings
        self._context = context
        self._poller = poller
        self._me = me
        self._counters = counters
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._impossible: set[str] = set()  # endpoints that ZeroMQ does not take
        self._named_at: dict[str, float] = {}  # endpoint -> when an engine has named it last
        self._refused: set[str] = set()  # endpoints that came beyond ROUTERS_MAX
        self._due_at = 0.0
        self._warned: dict[str, set[str]] = {}  # router endpoint -> what it said last
        self._unanswered_since: dict[str, float] = {}  # router endpoint -> first announcement without a welcome

    def changed(self) -> None:
        """Something a router should know at once."""
        self._due_at = 0.0

    def tick(
        self,
        engines: Iterable[Engine],
        *,
        reservations_waiting: int,
        links: Callable[[], list[LinkRate]],
        now: float,
    ) -> None:
        self._holdings.tick(self._sockets, self._tell_holdings, now)
        if now < self._due_at:
            return
        self._due_at = now + ANNOUNCE_S
        complete = [engine for engine in engines if engine.complete]
        named = {endpoint for engine in complete for endpoint in engine.routers}
        self._named_at.update(dict.fromkeys(named, now))
        for endpoint in [endpoint for endpoint, at in self._named_at.items() if now - at > UNNAMED_S]:
            self._part(endpoint)
        for endpoint in named - set(self._sockets):
            self._connect(endpoint)
        rates = links()
        for endpoint, socket in self._sockets.items():
            mine = [engine for engine in complete if endpoint in engine.routers]
            self._send(socket, mine, reservations_waiting, links=rates, number=self._holdings.number(endpoint))
            self._complain_if_silent(endpoint, now)

    def tell(self, message: Message) -> None:
        """To every router: they know which requests are theirs."""
        for socket in self._sockets.values():
            self._queue(socket, message)

    def handle_ready(
        self,
        ready: dict[object, int],
        *,
        cancel: Callable[[CancelHandoff], None],
        share: Callable[[Share], None],
        answer: Callable[[Ask], Answer],
    ) -> None:
        for endpoint, socket in self._sockets.items():
            if socket not in ready:
                continue
            for _ in range(BURST):
                try:
                    message = _decode(socket.recv(zmq.DONTWAIT))
                except zmq.Again:
                    break
                except WireError as error:
                    self._counters["bad_frames"] += 1
                    if isinstance(error, VersionMismatch):
                        self._unanswered_since.pop(endpoint, None)
                        self._pass_on(endpoint, [f"it does not hear this daemon: {error}"])
                    continue
                match message:
                    case Welcome():
                        self._unanswered_since.pop(endpoint, None)
                        self._pass_on(endpoint, message.warnings)
                    case Resync():
                        self._holdings.resync(endpoint)
                    case Share():
                        share(message)
                    case CancelHandoff():
                        cancel(message)
                    case Ask():
                        self._queue(socket, answer(message))

    def close(self) -> None:
        """Says goodbye, waiting at most a moment for it to leave."""
        for endpoint in list(self._sockets):
            self._part(endpoint)

    def _part(self, endpoint: str) -> None:
        self._named_at.pop(endpoint, None)
        self._impossible.discard(endpoint)
        self._refused.clear()  # there may be room for one of them
        self._warned.pop(endpoint, None)
        self._unanswered_since.pop(endpoint, None)
        socket = self._sockets.pop(endpoint, None)
        if socket is not None:
            self._send(socket, [], leaving=True)
            self._poller.unregister(socket)
            socket.close(100)

    def _pass_on(self, endpoint: str, warnings: list[str]) -> None:
        """A router repeats its warnings every second; people need each once."""
        for warning in set(warnings) - self._warned.get(endpoint, set()):
            log.warning("router %s: %s", endpoint, warning)
        self._warned[endpoint] = set(warnings)

    def _complain_if_silent(self, endpoint: str, now: float) -> None:
        since = self._unanswered_since.setdefault(endpoint, now)
        if now - since > SILENT_ROUTER_S:
            self._unanswered_since[endpoint] = now + SILENT_ROUTER_S * 5  # once a minute is enough
            log.warning(
                "router %s does not answer: is it up, and has it this cluster key (PDX_KEY_FILE) and this version?",
                endpoint,
            )

    def _connect(self, endpoint: str) -> None:
        if endpoint in self._impossible:
            return
        if len(self._sockets) + len(self._impossible) >= ROUTERS_MAX:
            self._counters["routers_refused"] += 1
            if endpoint not in self._refused:
                self._refused.add(endpoint)
                log.warning("router %s is told nothing: engines here name more than %d routers", endpoint, ROUTERS_MAX)
            return
        try:
            socket = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:  # no more descriptors: the next turn may fare better
            log.warning("no socket to router %s: %s", endpoint, error)
            return
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, has_ipv6(endpoint))
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MAX)
        socket.setsockopt(zmq.IDENTITY, f"{self._me.daemon_id}/{self._me.incarnation}".encode())
        lock(socket, self._cluster_key, server=False)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            self._impossible.add(endpoint)
            log.warning("engines want to be announced to %r, which is no router's address: %s", endpoint, error)
            return
        self._poller.register(socket, zmq.POLLIN)
        self._sockets[endpoint] = socket

    def _tell_holdings(self, endpoint: str, message: Holdings) -> bool:
        return self._queue(self._sockets[endpoint], message)

    def _send(
        self,
        socket: zmq.Socket[bytes],
        engines: list[Engine],
        reservations_waiting: int = 0,
        *,
        links: list[LinkRate] | None = None,
        number: int = 0,
        leaving: bool = False,
    ) -> None:
        loads = [
            EngineLoad(engine_id=e.info.engine_id, waiting=e.waiting, tokens_per_s=e.tokens_per_s) for e in engines
        ]
        message = Announce(
            daemon=self._me,
            engines=[engine.info for engine in engines],
            loads=loads,
            links=links or [],
            reservations_waiting=reservations_waiting,
            holdings=number,
            leaving=leaving,
        )
        self._queue(socket, message)

    def _queue(self, socket: zmq.Socket[bytes], message: Message) -> bool:
        """Whether the socket has taken it."""
        try:
            socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            self._counters["router_messages_dropped"] += 1
            return False
        return True
