"""All of pdxd that engines and tools import: find or start the daemon, attach, map the arena, exchange messages.

A DaemonClient belongs to one thread. It never blocks an engine: `send` queues, `poll` takes what is there. When the
daemon dies the client turns `alive = False` for good; `Attachment` makes a new one, and the engine serves without a
cache in between.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import select
import socket
import threading
import time

import msgspec
import zmq

from pdx import config as configuration
from pdx import joining
from pdx.buffer.arena import Arena
from pdx.config import Config
from pdx.errors import ConfigError, DaemonGone, PdxError, Refused, TooLarge, WireError
from pdx.starting import CONNECT_RETRY_S, connect
from pdx.voice import Voice
from pdx.wire import (
    FRAME_BYTES_MAX,
    TO_ATTACH,
    TO_ENGINE,
    Answer,
    Ask,
    Attach,
    Attached,
    AttachRefused,
    Message,
    decoder_of,
    encode,
    identity_of,
)

log = logging.getLogger("pdx.client")

ANSWER_BYTES_MAX = 64 << 10
ANSWER_S = 10.0  # of a daemon that listens late
SEND_QUEUE_MAX = 10_000
# Plain numbers: an operation on an enum's flags takes a microsecond, and every step has several.
EVENTS, READABLE, WRITABLE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 10.0
REATTACH_DEADLINE_S = 5.0  # a try; a daemon with a large arena may take several

_decode_attach = decoder_of(TO_ATTACH)
_decode = decoder_of(TO_ENGINE)


class DaemonClient:
    """One process's connection to the host's pdxd. One thread only.

    A `worker` speaks in every layer of a forward pass, so it has a voice. All others, and all answers, go by ZeroMQ,
    which says nothing when a connection ends: it then has room for no message, so that is what is looked for.
    """

    def __init__(
        self, connection: socket.socket, attached: Attached, descriptor: int | None, *, worker: bool = False
    ) -> None:
        self.attached = attached
        self.arena: Arena | None = None
        self._voice = Voice(connection)
        self._worker = worker
        self._asked = 0
        self.cut_off = False  # the daemon may live: it does not hear us, and never will on this connection
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity_of(attached.daemon.incarnation, attached.session))
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a daemon that comes back on this path is another one
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MAX)
        self._socket.connect(attached.socket)
        if descriptor is not None:
            try:
                self.arena = Arena.attach(descriptor, attached.arena_bytes)
            except BaseException:
                os.close(descriptor)
                self.close()
                raise

    @classmethod
    def attach(
        cls, config: Config, hello: Attach, *, deadline_s: float = 60.0, start: bool = True, again: bool = False
    ) -> DaemonClient:
        """Attaches to the daemon of config.run_path, starting one if none runs and `start` is set: as `config` says,
        or, `again`, as the one was that was killed there (a disk that an operator gave it must be found again).

        Raises DaemonGone if none answers in time, ConfigError if one can't be started as configured, or runs already
        without what is insisted on (see `joining`), Refused if it turned this client away (the message says why).
        """
        run_dir = configuration.ensure_run_dir(config.run_path)
        deadline = time.monotonic() + deadline_s
        while True:
            connection = connect(run_dir, config, deadline, start=start and config.start_daemon, again=again)
            left_s = deadline - time.monotonic()
            try:
                # Late is a daemon with a large arena, which may answer still.
                connection.settimeout(max(0.1, left_s) if left_s > 0 else ANSWER_S)
                connection.send(encode(hello))
                frame, descriptors, _, _ = socket.recv_fds(connection, ANSWER_BYTES_MAX, 1)
                if not frame:
                    raise ConnectionResetError("it has closed the connection")
                answer = _decode_attach(frame)
                break
            except OSError as error:
                connection.close()
                if not isinstance(error, ConnectionError) or time.monotonic() > deadline:
                    raise DaemonGone(f"pdxd in {run_dir} does not answer: {error}") from error
                time.sleep(CONNECT_RETRY_S)  # it was about to leave: the next one may answer
            except BaseException:
                connection.close()
                raise
        if isinstance(answer, AttachRefused):
            connection.close()
            raise Refused(answer.reason)
        if hello.kind != "tool":
            try:
                joining.check(config, answer.daemon)
            except ConfigError:
                _close(connection, descriptors)
                raise
            if not again:
                joining.warn(config)
        connection.setblocking(False)
        try:
            return cls(connection, answer, descriptors[0] if descriptors else None, worker=hello.kind == "worker")
        except zmq.ZMQError as error:
            _close(connection, descriptors)
            raise DaemonGone(f"no socket to pdxd can be made: {error}") from error

    @property
    def alive(self) -> bool:
        """False once the daemon's end of the connection is closed. Checked on every call: microseconds."""
        return self._voice.alive

    def send(self, message: Message) -> None:
        """Queues a message; never blocks. Raises DaemonGone if the daemon died, stopped reading long ago or closed the
        connection, TooLarge if it would do so because of this message."""
        if self._worker:
            self._voice.send(message)
            return
        if not self.alive:
            raise DaemonGone("pdxd has died")
        frame = encode(message)
        if len(frame) > FRAME_BYTES_MAX:
            raise TooLarge(f"{type(message).__name__} of {len(frame)} bytes is over the limit of {FRAME_BYTES_MAX}")
        try:
            self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again as error:
            self.cut_off = True
            raise DaemonGone("pdxd does not read its messages") from error

    def poll(self) -> list[Message]:
        """Messages that have arrived; never blocks. Malformed ones are dropped with a log line."""
        messages: list[Message] = []
        while (events := int(self._socket.getsockopt(EVENTS))) & READABLE:  # in most steps there is nothing
            try:
                messages.append(_decode(self._socket.recv(zmq.DONTWAIT)))
            except WireError as error:
                log.warning("dropped a message from pdxd: %s", error)
        if not (events & WRITABLE or self._worker):
            self.cut_off = True
        return messages

    def wait(self, timeout_s: float) -> list[Message]:
        """Like poll, but waits at most `timeout_s` for the first message."""
        self._socket.poll(max(1, round(timeout_s * 1000)))
        return self.poll()

    def publish_fence(self, step: int) -> None:
        """Worker: step `step` is over, and with it every access to slots that belonged to it. Steps only grow."""
        assert self.arena is not None
        self.arena.set_fence(self.attached.fence_offset, step)

    def ask(self, question: Ask, *, timeout_s: float = 5.0) -> Answer:
        """For tools: one question, one answer. Raises DaemonGone after `timeout_s`."""
        self._asked += 1  # the answer to a question that was given up may still come
        self.send(msgspec.structs.replace(question, number=self._asked))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0 and self.alive:
            for message in self.wait(min(left, 0.2)):
                if isinstance(message, Answer) and message.number == self._asked:
                    return message
        what = question.verb if isinstance(question.verb, str) else type(question.verb).__name__.lower()
        raise DaemonGone(f"pdxd did not answer {what!r} within {timeout_s:g} s")

    def watched(self) -> int:
        """A descriptor of the caller's own that becomes readable when the daemon is gone."""
        return self._voice.watched()

    def voice(self) -> Voice:
        """Worker: for a thread of its own. pdxd takes this process for gone only when that is closed, too."""
        return self._voice.another()

    def close(self) -> None:
        """Unmaps the arena, then says goodbye by closing the connection (in this order: see daemon.sessions)."""
        self.unmap()
        self._socket.close(0)
        self._context.term()
        self._voice.close()

    def unmap(self) -> None:
        """Gives the arena back. Idempotent."""
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    def finish_sending(self, *, timeout_s: float) -> None:
        """Worker, at the end of a step: see `Voice`."""
        self._voice.finish_sending(timeout_s=timeout_s)

    def __enter__(self) -> DaemonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Attachment:
    """Keeps a client attached over daemon restarts. `client` and `close` belong to one thread and cost microseconds.

    A thread of its own sleeps on the connection; when the daemon dies it finds or starts the next one, so that an
    engine that is idle comes back too, and a busy one does not stop for it. Of a client that it has handed over it
    touches the arena only, once the daemon is dead and its owner has let go: the next daemon may need that memory.

    A client that was cut off, or is to be left, is closed by its owner, and another one found for it in the same way.

    The owner is told by a number of that thread's, not by the connection: it asks several times a step, and a system
    call lets go of the interpreter, which another thread may then keep for a millisecond while the step waits.
    """

    def __init__(self, config: Config, hello: Attach) -> None:
        self._config = config
        self._hello = hello
        self._client: DaemonClient | None = None
        self._number = 0  # of the client: so many before it have lost their daemon
        self._lost = 0  # clients that have, in all
        self._left = -1  # the last one that its owner has closed
        self._arrived: queue.SimpleQueue[tuple[int, DaemonClient]] = queue.SimpleQueue()
        self._keeper: threading.Thread | None = None
        self._lock = threading.Lock()  # of the client's arena, and of what has arrived
        self._held = True
        self._stop_read, self._stop_write = socket.socketpair()

    def client(self) -> DaemonClient | None:
        """The live client, or None while there is no daemon; unmaps a dead daemon's arena.

        The first call finds or starts a daemon, which may take a while, and raises what DaemonClient.attach raises.
        """
        if self._keeper is None:
            self._client = DaemonClient.attach(self._config, self._hello)
            self._keeper = threading.Thread(target=self._keep, args=(self._client.watched(),), name="pdx-keeper")
            self._keeper.daemon = True  # an engine that is ending must not wait for a daemon to come
            self._keeper.start()
        if self._client is not None and self._is_lost:
            log.warning("lost pdxd: serving without it")
            with self._lock:
                self._client.close()
                self._client = None
        elif self._client is not None and self._client.cut_off:
            log.warning("pdxd has closed the connection")
            self.leave()
        if self._client is None:
            with self._lock:
                if not self._arrived.empty():
                    log.warning("attached to pdxd again")
                    self._number, self._client = self._arrived.get()
        return self._client

    def leave(self) -> None:
        """Closes the live client, if there is one, as if its daemon had died. Its owner touches no arena meanwhile."""
        if self._client is None or self._is_lost:
            return
        with self._lock:
            self._client.close()
            self._client = None
        self._left = self._number
        self._stop_write.send(b"!")

    @property
    def _is_lost(self) -> bool:
        return self._lost > self._number

    def at(self, epoch: str) -> None:
        """The next daemon hears at once that the engine's weights are of this epoch."""
        assert self._hello.engine is not None
        self._hello = msgspec.structs.replace(self._hello, engine=self._hello.engine.at(epoch))

    def hold(self) -> None:
        """From now on the arena stays mapped, whatever becomes of its daemon; as it does for who never lets go."""
        with self._lock:
            self._held = True

    def let_go(self) -> None:
        """Until the next `hold` the owner touches no arena."""
        with self._lock:
            self._held = False
            if self._client is not None and self._is_lost:
                self._client.unmap()

    def close(self) -> None:
        """Ends the thread and closes every client."""
        self._stop_write.close()
        if self._keeper is not None:
            self._keeper.join(REATTACH_DEADLINE_S + 1.0)
        if self._client is not None:
            self._client.close()
            self._client = None
        while not self._arrived.empty():
            self._arrived.get()[1].close()
        self._stop_read.close()

    def _keep(self, watched: int) -> None:
        while not self._stopped_within(None, watched):
            os.close(watched)
            self._lost += 1
            self._unmap_dead()
            fresh = self._attach_again()
            if fresh is None:
                return
            watched = fresh.watched()
            self._arrived.put((self._lost, fresh))
        os.close(watched)

    def _unmap_dead(self) -> None:
        """All clients so far are dead ones'."""
        with self._lock:
            while not self._arrived.empty():  # nobody has taken it
                self._arrived.get()[1].close()
            if not self._held and self._client is not None:
                self._client.unmap()

    def _attach_again(self) -> DaemonClient | None:
        """The next daemon's client; None if told to stop first."""
        backoff_s = BACKOFF_FIRST_S
        # Both processes of an engine and all engines of a host lose a daemon together: jitter spreads them.
        while not self._stopped_within(backoff_s * random.uniform(0.5, 1.0)):  # noqa: S311
            try:
                return DaemonClient.attach(self._config, self._hello, deadline_s=REATTACH_DEADLINE_S, again=True)
            # One that speaks another wire version is as good as none; descriptors and disks may have room again.
            except (PdxError, OSError) as error:
                log.warning("no pdxd yet: %s", error)
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
        return None

    def _stopped_within(self, timeout_s: float | None, watched: int = -1) -> bool:
        """True if told to stop; False when the time is over, or `watched` has ended or is to be left."""
        waiting = select.poll()
        waiting.register(self._stop_read, select.POLLIN)
        if watched >= 0:
            waiting.register(watched, select.POLLIN)
        while self._left != self._lost or watched < 0:
            ready = waiting.poll(None if timeout_s is None else timeout_s * 1000)
            told = any(descriptor == self._stop_read.fileno() for descriptor, _ in ready)
            if not told or not self._stop_read.recv(1):
                return told
        return False


def _close(connection: socket.socket, descriptors: list[int]) -> None:
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)
