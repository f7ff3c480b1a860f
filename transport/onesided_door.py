"""How a one-sided lane comes by its links: the socket it listens on, and a thread for every peer that is being greeted.

Who connects may be anybody until the cluster key is proved: such have places of their own, so that they can keep out
each other only.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable

from pdx.errors import PdxError, PeerGone
from pdx.limits import within_descriptors
from pdx.transport.handshake import greet_as_acceptor, greet_as_connector
from pdx.transport.sockets import connect, reset_on_close, shut, tune

logger = logging.getLogger(__name__)

# Peers that write into us, for as long as they live: each is a descriptor and a few KiB. With few descriptors, fewer.
LINKS_MAX, LINKS_LEAST = 1024, 256
# Each is a thread for as long as it takes to greet it; of those that connect to us the oldest makes room for a new one.
STRANGERS_MAX = 64

Outcome = socket.socket | str  # a connection to one of us, or why there is none


class Door:
    """Owned by the reactor's thread, where `call` has things done; `then` is called there, unless end() came first."""

    def __init__(
        self,
        listening: socket.socket,
        poll: select.epoll,
        *,
        scheme: str,
        key: bytes | None,
        name: str,
        stall_s: float,
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        self.is_deaf = False  # accepts nobody until it listens again
        self._listening = listening
        self._poll = poll
        self._scheme = scheme
        self._key = key
        self._name = name
        self._stall_s = stall_s
        self._call = call
        self._strangers: dict[_Greeter, None] = {}  # have connected to us; the oldest first
        self._connecting: dict[_Greeter, None] = {}
        self._is_over = False
        poll.register(listening, select.EPOLLIN)

    @property
    def is_greeting(self) -> bool:
        return bool(self._strangers or self._connecting)

    def fileno(self) -> int:
        return self._listening.fileno()

    def accept(self, then: Callable[[Outcome], None], *, link_count: int) -> None:
        """Takes in the next one, unless so many links are open."""
        try:
            accepted, address = self._listening.accept()
        except OSError as error:  # the peer has gone already, or descriptors ran out: the next tick may fare better
            logger.warning("%s: accept failed: %s", self._name, error)
            self._poll.unregister(self._listening)
            self.is_deaf = True
            return
        most = within_descriptors(LINKS_MAX, least=LINKS_LEAST)
        if link_count >= most:
            logger.warning("%s: refused %s: %d links are open", self._name, address, most)
            reset_on_close(accepted)  # the peer is told why that may be (handshake)
            accepted.close()
            return
        if len(self._strangers) >= STRANGERS_MAX:
            next(iter(self._strangers)).end(self._stall_s)  # and is forgotten before the next one is accepted

        def greet(greeter: _Greeter) -> socket.socket:
            greeter.hold(accepted)
            tune(accepted, self._stall_s)
            greet_as_acceptor(accepted, self._key)
            return accepted

        if not self._start(greet, then, self._strangers):
            accepted.close()

    def connect(self, endpoint: str, then: Callable[[Outcome], None]) -> None:
        def greet(greeter: _Greeter) -> socket.socket:
            connection = connect(endpoint, scheme=self._scheme, stall_s=self._stall_s, check=greeter.hold)
            greet_as_connector(connection, self._key)
            return connection

        self._start(greet, then, self._connecting)

    def listen_again(self) -> None:
        if self.is_deaf:
            self.is_deaf = False
            self._poll.register(self._listening, select.EPOLLIN)

    def close(self) -> None:
        """Lets nobody in any more, and sends away who is being greeted."""
        if not self.is_deaf and self._listening.fileno() >= 0:
            self._poll.unregister(self._listening)
        self.is_deaf = False
        self._listening.close()
        for greeter in (*self._strangers, *self._connecting):
            greeter.stop()

    def end(self) -> None:
        """What is greeted from now on is hung up on."""
        self.close()
        self._is_over = True

    def _start(
        self,
        greet: Callable[[_Greeter], socket.socket],
        then: Callable[[Outcome], None],
        greeters: dict[_Greeter, None],
    ) -> bool:
        def greeted(greeter: _Greeter, outcome: Outcome) -> None:
            if self._is_over:  # this may be the greeter's own thread
                if isinstance(outcome, socket.socket):
                    outcome.close()
                return
            greeter.join(self._stall_s)  # its last act was to call us
            del greeters[greeter]
            if self._listening.fileno() < 0 and isinstance(outcome, socket.socket):
                outcome.close()
                outcome = "the lane was closed"
            then(outcome)

        def at_end(greeter: _Greeter, outcome: Outcome) -> None:
            self._call(lambda: greeted(greeter, outcome))

        try:
            greeter = _Greeter(greet, at_end=at_end, name=f"{self._name}-greet")
        except RuntimeError as error:  # no more threads
            reason = f"no more connections can be made here: {error}"
            self._call(lambda: then(reason))
            return False
        greeters[greeter] = None
        return True


class _Greeter:
    """A thread that makes sure of one peer; its waits end after a stall time each.

    `at_end` is called on that thread, with the connection or with why there is none.
    """

    def __init__(
        self,
        greet: Callable[[_Greeter], socket.socket],
        *,
        at_end: Callable[[_Greeter, Outcome], None],
        name: str,
    ) -> None:
        self._greet = greet
        self._at_end = at_end
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def hold(self, connection: socket.socket) -> None:
        """What stop() shuts. Raises PeerGone if it came first."""
        with self._lock:
            self._socket = connection
            if self._is_stopped:
                raise PeerGone("the lane was closed")

    def stop(self) -> None:
        """Has no effect on who is greeted already."""
        with self._lock:
            self._is_stopped = True
            if self._socket is not None:
                shut(self._socket)

    def end(self, timeout_s: float) -> None:
        self.stop()
        self.join(timeout_s)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        outcome: Outcome
        try:
            outcome = self._greet(self)
            with self._lock:
                self._socket = None
        except Exception as error:
            if not isinstance(error, OSError | PdxError):
                logger.exception("greeting failed")
            outcome = str(error)
            with self._lock:
                if self._socket is not None:
                    self._socket.close()
        self._at_end(self, outcome)
