"""The router's side of the control conversation: hears announcements, failures and answers; welcomes, cancels and asks.

Knows sockets and identities; what an announcement means is the directory's business. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from pdx.errors import DaemonGone, VersionMismatch, WireError
from pdx.router.choice.knowledge import Knowledge
from pdx.router.engines.control import Control
from pdx.router.engines.versions import OtherVersions
from pdx.router.metrics import Metrics
from pdx.wire import (
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
    shortened,
)

DAEMONS_MAX = 4096
NUMBER_BITS = 39  # of questions; the wire has 40

_log = logging.getLogger(__name__)
_decode: Callable[[bytes | memoryview], Announce | Holdings | HandoffFailed | Answer] = decoder_of(ROUTER)


class Registry:
    """Over a control socket. `run()` feeds announcements to `heard`, whose warnings go back in the Welcome."""

    def __init__(
        self,
        control: Control,
        *,
        heard: Callable[[Announce], list[str]],
        handoff_failed: Callable[[bytes, str], None],
        metrics: Metrics,
        knowledge: Knowledge | None = None,
    ) -> None:
        self._heard = heard
        self._handoff_failed = handoff_failed
        self._metrics = metrics
        self._knowledge = knowledge if knowledge is not None else Knowledge()
        self.heard_holdings: Callable[[str], None] = lambda daemon_id: None  # told after each HOLDINGS
        self._control = control
        self._others = OtherVersions(control)
        self._identities: dict[str, tuple[int, bytes]] = {}  # daemon id -> incarnation, identity frame
        # Workers of one router hear each other's answers: their numbers must not meet.
        self._asked = secrets.randbits(NUMBER_BITS)
        self._questions: dict[int, tuple[bytes, asyncio.Future[Answer]]] = {}  # number -> who was asked, its answer

    async def run(self) -> None:
        """Receives until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._control.run())
            tasks.create_task(self._receive())

    async def _receive(self) -> None:
        while True:
            frames = await self._control.receive()
            try:
                if len(frames) != 2:
                    raise WireError(f"{len(frames)} frames instead of 2")
                message = _decode(frames[1])
            except VersionMismatch as error:
                self._metrics.bad_frames.inc()
                await self._others.met(frames[0], error)
                continue
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
        self.tell(daemon, CancelHandoff(handoff_id=handoff_id, attempt=attempt, reason=shortened(reason)))

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
        self._asked = number = (self._asked + 1) % (1 << NUMBER_BITS)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._questions[number] = (identity, answer)
        try:
            async with asyncio.timeout(timeout_s):
                await self._control.send(identity, encode(msgspec.structs.replace(question, number=number)))
                return await answer
        except zmq.ZMQError as error:
            raise DaemonGone(f"this daemon can't be reached: {error.strerror}") from error
        except TimeoutError as error:
            raise DaemonGone(f"this daemon did not answer within {timeout_s:g} s") from error
        finally:
            del self._questions[number]

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
        sent = asyncio.ensure_future(self._control.send(identity, encode(message)))
        sent.add_done_callback(self._count_undelivered)

    def _count_undelivered(self, sent: asyncio.Future[Any]) -> None:
        if sent.cancelled() or sent.exception() is not None:
            self._metrics.undelivered.inc()
