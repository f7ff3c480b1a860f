"""The router's side of the control conversation: hears announcements, failures and answers; welcomes, cancels and asks.

Knows sockets and identities; what an announcement means is the directory's business. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from pdx.curve import lock
from pdx.errors import ConfigError, DaemonGone, WireError
from pdx.router.knowledge import Knowledge
from pdx.router.metrics import Metrics
from pdx.wire import (
    FRAME_BYTES_MAX,
    ROUTER,
    Announce,
    Answer,
    Ask,
    CancelHandoff,
    DaemonRef,
    HandoffFailed,
    Holdings,
    Message,
    Resync,
    Welcome,
    decoder_of,
    encode,
)

# Every daemon says one thing a second; more than this unheard means that the router is stuck anyway.
RECEIVE_QUEUE_MAX = 1024
# Welcomes and cancels are small; a daemon that reads none for so long has died.
SEND_QUEUE_MAX = 1024
DAEMONS_MAX = 4096

_log = logging.getLogger(__name__)
_decode: Callable[[bytes | memoryview], Announce | Holdings | HandoffFailed | Answer] = decoder_of(ROUTER)


class Registry:
    """A bound ROUTER socket. `run()` feeds announcements to `heard`, whose warnings go back in the Welcome."""

    def __init__(
        self,
        control: str,
        *,
        cluster_key: bytes,
        heard: Callable[[Announce], list[str]],
        handoff_failed: Callable[[bytes, str], None],
        metrics: Metrics,
        knowledge: Knowledge | None = None,
    ) -> None:
        """Binds. Raises ConfigError if the endpoint is taken or malformed."""
        self._heard = heard
        self._handoff_failed = handoff_failed
        self._metrics = metrics
        self._knowledge = knowledge if knowledge is not None else Knowledge()
        self.heard_holdings: Callable[[str], None] = lambda daemon_id: None  # told after each HOLDINGS
        self._identities: dict[str, tuple[int, bytes]] = {}  # daemon id -> incarnation, identity frame
        self._asked = 0
        self._questions: dict[int, tuple[bytes, asyncio.Future[Answer]]] = {}  # number -> who was asked, its answer
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = FRAME_BYTES_MAX
        self._socket.rcvhwm = RECEIVE_QUEUE_MAX
        self._socket.sndhwm = SEND_QUEUE_MAX
        self._socket.router_mandatory = True  # an unknown daemon is an error to count, not a silence
        self._socket.router_handover = True  # a daemon that connects again gets its name back
        lock(self._socket, cluster_key, server=True)
        try:
            self._socket.bind(control)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"can't listen on --control {control}: {error.strerror}") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def run(self) -> None:
        """Receives until cancelled."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                if len(frames) != 2:
                    raise WireError(f"{len(frames)} frames instead of 2")
                message = _decode(frames[1])
            except WireError as error:
                self._metrics.bad_frames.inc()
                _log.debug("dropped a control frame: %s", error)
                continue
            match message:
                case Announce():
                    self._on_announce(frames[0], message)
                case Holdings():
                    if not self._knowledge.on_holdings(message):
                        self._send(frames[0], Resync())
                    self.heard_holdings(message.daemon_id)
                    await asyncio.sleep(0)  # many may have come at once, and requests wait
                case HandoffFailed():
                    self._handoff_failed(message.handoff_id, message.reason)
                case Answer():
                    self._on_answer(frames[0], message)

    def cancel(self, daemon: DaemonRef, *, handoff_id: bytes, reason: str, attempt: int = 0) -> None:
        """Tells a daemon to end a handoff. Never blocks; a daemon gone meanwhile needs no telling."""
        self.tell(daemon, CancelHandoff(handoff_id=handoff_id, attempt=attempt, reason=reason))

    def tell(self, daemon: DaemonRef, message: Message) -> None:
        """Says something that asks for no answer. Never blocks."""
        incarnation, identity = self._identities.get(daemon.daemon_id, (0, b""))
        if incarnation != daemon.incarnation or not identity:
            self._metrics.undelivered.inc()
            return
        self._send(identity, message)

    async def ask(self, daemon: DaemonRef, question: Ask, *, timeout_s: float) -> Answer:
        """This daemon's answer. Raises DaemonGone if it can't be reached, or says nothing for so long."""
        incarnation, identity = self._identities.get(daemon.daemon_id, (0, b""))
        if incarnation != daemon.incarnation:
            raise DaemonGone("this daemon has left")
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._questions[number] = (identity, answer)
        try:
            async with asyncio.timeout(timeout_s):
                frames = [identity, encode(msgspec.structs.replace(question, number=number))]
                await self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
                return await answer
        except zmq.ZMQError as error:
            raise DaemonGone(f"this daemon can't be reached: {error.strerror}") from error
        except TimeoutError as error:
            raise DaemonGone(f"this daemon did not answer within {timeout_s:g} s") from error
        finally:
            del self._questions[number]

    def close(self) -> None:
        """Idempotent."""
        self._socket.close(linger=0)
        self._context.term()

    def _on_announce(self, identity: bytes, announce: Announce) -> None:
        daemon = announce.daemon
        warnings = self._heard(announce)
        if announce.leaving:
            self._knowledge.gone(daemon.daemon_id)
            self._identities.pop(daemon.daemon_id, None)
            return
        if daemon.daemon_id not in self._identities and len(self._identities) >= DAEMONS_MAX:
            self._identities.pop(next(iter(self._identities)))  # the oldest; a live one is back within a second
        self._identities[daemon.daemon_id] = (daemon.incarnation, identity)
        self._send(identity, Welcome(warnings=warnings))
        if not self._knowledge.on_announce(daemon, announce.holdings):
            self._send(identity, Resync())

    def _on_answer(self, identity: bytes, answer: Answer) -> None:
        """Only who was asked can answer; who comes too late, or twice, is not heard."""
        asked, waiting = self._questions.get(answer.number, (b"", None))
        if waiting is not None and asked == identity and not waiting.done():
            waiting.set_result(answer)

    def _send(self, identity: bytes, message: Message) -> None:
        # NOBLOCK: at once, or refused because the peer is gone or its queue is full.
        sent = asyncio.ensure_future(self._socket.send_multipart([identity, encode(message)], flags=zmq.NOBLOCK))
        sent.add_done_callback(self._count_undelivered)

    def _count_undelivered(self, sent: asyncio.Future[Any]) -> None:
        if sent.cancelled() or sent.exception() is not None:
            self._metrics.undelivered.inc()
