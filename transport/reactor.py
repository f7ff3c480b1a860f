"""The one thread of a one-sided lane: links, channels, grants and deadlines, all owned by it and by nobody else.

It sleeps on descriptors, except while transfers are under way: no fabric offers a descriptor that says "done".
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from pdx.errors import PeerGone, TransportError, WireError
from pdx.transport.api import Event, PeerLost, PutFailed, Span
from pdx.transport.fabric import Fabric, Memory
from pdx.transport.link import Greeting, Link
from pdx.transport.link_messages import Bye, LinkMessage, Shut
from pdx.transport.mailbox import Mailbox
from pdx.transport.onesided_receiver import Grants, InboundPeer
from pdx.transport.onesided_sender import OneSidedChannel, OneSidedPut

logger = logging.getLogger(__name__)

# One link a peer; each is a descriptor and a few KiB.
LINKS_MAX = 256
# Fabrics copy while they are asked, so the thread asks without a pause at first: a slab is done by then, and on a busy
# machine the shortest sleep may last 4 ms. What takes longer is the network's; then it leaves its core to others.
SPIN_S = 1e-3
TRANSFER_POLL_S = 20e-6
# While something has a deadline, or a peer must take bytes.
TICK_S = 0.05
# A peer that ends without BYE was killed, or broke with us. What of its writes needs our help (sockets under the
# fabric) may lie in kernel buffers still: a few MiB, moved by a thread that sleeps on them. Waited for in slices, so
# that a stop of this process shortens the wait by one slice only.
SETTLE_SLICES = 10
# Silence is not the end of a process: over a broken network the peer may write on until its keep-alive, of 13 s, ends
# its side too, and its endpoint with it.
SETTLE_SLICES_AFTER_SILENCE = 600
# abort() waits no longer than this for peers to end what they write into us.
WIND_DOWN_S = 2.0
# While puts follow puts, the control thread is not woken for every PutDone.
ANNOUNCE_EVERY_S = 0.001

Broken = (OSError, TransportError, WireError)


class Reactor:
    """call(), stop() and join() are for other threads; everything else runs on the reactor's own, or through call()."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        scheme: str,
        key: bytes | None,
        fabric: Fabric,
        mailbox: Mailbox,
        name: str,
        stall_s: float,
    ) -> None:
        self.refused_count = 0
        self.channels: dict[int, OneSidedChannel] = {}
        self.grants = Grants(emit=self._emit)
        self._listening = listening
        self._scheme = scheme
        self._key = key
        self._fabric = fabric
        self._mailbox = mailbox
        self._name = name
        self._stall_s = stall_s
        self._commands: deque[Callable[[], None]] = deque()
        self._greetings: set[Greeting] = set()
        self._inbound: dict[int, InboundPeer] = {}  # by descriptor
        self._outbound: dict[int, OneSidedChannel] = {}  # by descriptor
        self._settling: dict[int, int] = {}  # link number -> slices left
        self._link_count = 0
        self._blocked_since: dict[int, float] = {}  # descriptor -> since when its peer takes no messages
        self._ticked_s = 0.0
        self._announced_s = 0.0
        self._owes_announcement = False
        self._is_deaf = False  # accepts nothing until the next tick
        self._is_stopped = False
        self._is_over = False
        self._drain_until_s: float | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._poll.register(listening, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=f"{name}-reactor", daemon=True)
        self._thread.start()

    def call(self, command: Callable[[], None]) -> None:
        """Has the reactor do this, in the order of the calls."""
        self._commands.append(command)
        if self._is_over:
            self._obey()  # only to fail
        elif self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def stop(self, *, drain_s: float) -> None:
        """Sends what is queued for at most `drain_s` and ends. Takes no time; join() waits for the end."""
        self._drain_until_s = time.monotonic() + drain_s
        self._is_stopped = True
        self.call(lambda: None)

    def join(self, timeout_s: float) -> bool:
        """Whether the thread ended in time. Frees what it used."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            return False
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)
        return True

    # --- commands ---

    def open_window(self, window: int, memory: Memory, spans: Sequence[Span]) -> None:
        self.grants.open(window, memory, spans)

    def close_window(self, window: int) -> None:
        askers = self.grants.close(window)
        for party in list(self._inbound.values()):
            if party.number in askers:  # one that is refused hears nothing any more: its own end closes the window
                self._guarded_send(party, Shut(window))

    def connect(self, number: int, endpoint: str) -> None:
        if self._is_over:
            self._emit(PeerLost(number, endpoint, "the lane failed"))
            return
        self.channels[number] = OneSidedChannel(number, endpoint, fabric=self._fabric, emit=self._emit)
        self._greet(endpoint, lambda outcome: self._connected(number, outcome))

    def put(self, channel: int, put: OneSidedPut, queue: bytes, urgency: float) -> None:
        target = self.channels.get(channel)
        if target is None:
            self._emit(PutFailed(put.ticket, "the channel is lost"))
        else:
            target.put(put, queue, urgency)

    def cancel(self, queue: bytes) -> None:
        for channel in self.channels.values():
            channel.cancel(queue)

    def break_channel(self, channel: int, reason: str) -> None:
        if channel in self.channels:
            self._lose(self.channels[channel], reason)

    # --- the thread ---

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._turn()
            self._wind_down()
        except Exception:
            logger.exception("%s: the lane failed; its peers are lost", self._name)
        finally:
            self._end()

    def _turn(self) -> None:
        ready = self._wait()
        self._run_commands()
        for descriptor, _ in ready:
            if descriptor == self._listening.fileno():
                self._accept()
            elif descriptor in self._inbound:
                self._serve_inbound(self._inbound[descriptor])
            elif descriptor in self._outbound:
                self._serve_outbound(self._outbound[descriptor])
        for channel in list(self.channels.values()):
            self._guarded(channel, channel.advance, time.monotonic())
        self._tick(time.monotonic())

    def _wait(self) -> list[tuple[int, int]]:
        is_flying = any(channel.is_flying or channel.is_eager for channel in self.channels.values())
        self._announce(is_flying=is_flying)
        if is_flying:
            if all(self._may_pause(channel) for channel in self.channels.values()):
                select.select([self._poll], [], [], TRANSFER_POLL_S)
            return self._poll.poll(0)
        return self._poll.poll(TICK_S if self._is_stopped or self._is_due() else None)

    def _is_due(self) -> bool:
        """Something has a deadline, or must be sent again and again, until a peer takes it."""
        return (
            bool(self._settling or self._blocked_since or self._is_deaf)
            or any(not channel.is_idle for channel in self.channels.values())
            or any(party.link.unsent_bytes for party in self._inbound.values())
        )

    def _may_pause(self, channel: OneSidedChannel) -> bool:
        return not channel.is_eager and channel.moved_s + SPIN_S < time.monotonic()

    def _emit(self, event: Event) -> None:
        if self._is_over:
            self._mailbox.add(event)
            return
        self._mailbox.add_quietly(event)
        self._owes_announcement = True

    def _announce(self, *, is_flying: bool) -> None:
        now_s = time.monotonic()
        if self._owes_announcement and (not is_flying or now_s > self._announced_s + ANNOUNCE_EVERY_S):
            self._owes_announcement = False
            self._announced_s = now_s
            self._mailbox.announce()

    def _run_commands(self) -> None:
        with contextlib.suppress(BlockingIOError):  # woken by something else
            os.eventfd_read(self._wake)
        self._obey()

    def _obey(self) -> None:
        with contextlib.suppress(IndexError):  # empty; once the thread is over, two may empty it
            for _ in range(len(self._commands)):
                self._commands.popleft()()

    # --- links ---

    def _greet(self, peer: str | socket.socket, then: Callable[[socket.socket | str], None]) -> None:
        def at_end(greeting: Greeting, outcome: socket.socket | str) -> None:
            self.call(lambda: greeted(greeting, outcome))

        def greeted(greeting: Greeting, outcome: socket.socket | str) -> None:
            greeting.join(self._stall_s)  # its thread's last act was to call us
            self._greetings.discard(greeting)
            then(outcome)

        try:
            greeting = Greeting(
                peer, scheme=self._scheme, key=self._key, stall_s=self._stall_s, at_end=at_end, name=self._name
            )
        except RuntimeError as error:  # no more threads
            if isinstance(peer, socket.socket):
                peer.close()
            reason = f"no more connections can be made here: {error}"
            self.call(lambda: then(reason))
            return
        self._greetings.add(greeting)

    def _accept(self) -> None:
        try:
            accepted, address = self._listening.accept()
        except OSError as error:  # the peer has gone already, or descriptors ran out: the next tick may fare better
            logger.warning("%s: accept failed: %s", self._name, error)
            self._poll.unregister(self._listening)
            self._is_deaf = True
            return
        if len(self._inbound) + len(self._greetings) >= LINKS_MAX:
            self.refused_count += 1
            logger.warning("%s: refused %s: %d links are open", self._name, address, LINKS_MAX)
            accepted.close()
            return
        self._greet(accepted, self._accepted)

    def _accepted(self, outcome: socket.socket | str) -> None:
        if isinstance(outcome, str):
            self.refused_count += 1
            logger.warning("%s: dropped a connection: %s", self._name, outcome)
            return
        self._link_count += 1
        party = InboundPeer(self._link_count, Link(outcome), grants=self.grants, fabric=self._fabric)
        self._inbound[party.link.fileno()] = party
        self._watch(party.link)

    def _connected(self, number: int, outcome: socket.socket | str) -> None:
        channel = self.channels.get(number)
        if channel is None:
            if isinstance(outcome, socket.socket):
                outcome.close()
        elif isinstance(outcome, str):
            self._lose(channel, outcome)
        else:
            channel.link = Link(outcome)
            self._outbound[channel.link.fileno()] = channel
            self._watch(channel.link)

    def _watch(self, link: Link) -> None:
        self._poll.register(link.fileno(), select.EPOLLIN)

    def _unwatch(self, link: Link) -> None:
        self._poll.unregister(link.fileno())
        self._blocked_since.pop(link.fileno(), None)

    # --- peers that write into us ---

    def _serve_inbound(self, party: InboundPeer) -> None:
        try:
            if party.is_refused:
                party.link.discard()
                return
            if not self._mailbox.wait_for_room(self._stall_s):
                raise WireError("we are too far behind to take its notices")
            for message in party.link.receive():
                party.handle(message)
        except WireError as error:
            self._refuse(party, str(error))
        except (OSError, PeerGone) as error:
            self._end_inbound(party, error)

    def _refuse(self, party: InboundPeer, reason: str) -> None:
        """Hangs up. What it still writes it can't take back: its windows wait until it has hung up too."""
        logger.warning("%s: dropped a peer: %s", self._name, reason)
        self.refused_count += 1
        party.is_refused = True
        try:
            party.link.finish()
        except OSError as error:
            self._end_inbound(party, error)

    def _guarded_send(self, party: InboundPeer, message: LinkMessage) -> None:
        try:
            party.link.send(message)
        except OSError as error:
            self._end_inbound(party, error)

    def _end_inbound(self, party: InboundPeer, error: Exception) -> None:
        self._unwatch(party.link)
        del self._inbound[party.link.fileno()]
        party.link.close()
        if party.said_bye:
            self.grants.link_is_quiet(party.number)
            return
        logger.info("%s: a peer left without a word: %s", self._name, error)
        has_ended = isinstance(error, PeerGone | ConnectionError)
        self._settling[party.number] = SETTLE_SLICES if has_ended else SETTLE_SLICES_AFTER_SILENCE

    # --- peers that we write into ---

    def _serve_outbound(self, channel: OneSidedChannel) -> None:
        def serve(_: float) -> None:
            assert channel.link is not None
            for message in channel.link.receive():
                channel.handle(message)

        self._guarded(channel, serve, 0.0)

    def _guarded(self, channel: OneSidedChannel, step: Callable[[float], None], now: float) -> None:
        try:
            step(now)
        except Broken as error:
            self._lose(channel, str(error))

    def _lose(
        self, channel: OneSidedChannel, reason: str, *, is_ours: bool = False, wait_s: float = WIND_DOWN_S
    ) -> None:
        """What was posted gets some time to end, since a break can't take back what the network has."""
        del self.channels[channel.number]
        if channel.link is not None:
            self._unwatch(channel.link)
            del self._outbound[channel.link.fileno()]
        self._say_bye_when_quiet(channel, wait_s)
        channel.end(reason, is_ours=is_ours)

    def _say_bye_when_quiet(self, channel: OneSidedChannel, wait_s: float) -> None:
        if channel.link is None:
            return
        try:
            channel.stop_posting()
            deadline_s = time.monotonic() + wait_s
            while channel.is_flying and time.monotonic() < deadline_s:
                channel.advance(time.monotonic())
            if not channel.is_flying:
                channel.link.send(Bye())
        except Broken:
            return  # it learns from the end of the connection

    # --- deadlines and the end ---

    def _tick(self, now: float) -> None:
        if now < self._ticked_s + TICK_S:
            return
        self._ticked_s = now
        if self._is_deaf:
            self._is_deaf = False
            self._poll.register(self._listening, select.EPOLLIN)
        for number, slices_left in list(self._settling.items()):
            if slices_left:
                self._settling[number] = slices_left - 1
            else:
                del self._settling[number]
                self.grants.link_is_quiet(number)
        for channel in list(self.channels.values()):
            if channel.is_stuck(now, self._stall_s):
                self._lose(channel, f"peer did not move in {self._stall_s:g} s", wait_s=0.0)
            elif channel.link is not None:
                self._guarded(channel, lambda at, link=channel.link: self._flush(link, at), now)  # type: ignore[misc]
        for party in list(self._inbound.values()):
            try:
                party.link.flush()  # without a deadline: one that is stopped may still have to drain
            except OSError as error:
                self._end_inbound(party, error)

    def _flush(self, link: Link, now: float) -> None:
        link.flush()
        if not link.unsent_bytes:
            self._blocked_since.pop(link.fileno(), None)
        elif now > self._blocked_since.setdefault(link.fileno(), now) + self._stall_s:
            raise PeerGone("peer takes no messages any more")

    def _wind_down(self) -> None:
        """Sends what is queued, ends what is under way, and waits until nobody writes into us."""
        assert self._drain_until_s is not None
        self._run_commands()  # puts that came before stop()
        while time.monotonic() < self._drain_until_s and not all(c.is_idle for c in self.channels.values()):
            self._turn()
        if not self._is_deaf:
            self._poll.unregister(self._listening)
        self._is_deaf = False
        self._listening.close()
        for greeting in self._greetings:
            greeting.stop()
        for channel in list(self.channels.values()):
            self._lose(channel, "the lane was closed", is_ours=True)
        for party in list(self._inbound.values()):
            try:
                party.link.finish()
            except OSError as error:
                self._end_inbound(party, error)
        deadline_s = time.monotonic() + WIND_DOWN_S
        while (self._inbound or self._greetings) and time.monotonic() < deadline_s:
            self._turn()

    def _end(self) -> None:
        self._is_stopped = True
        for channel in list(self.channels.values()):
            channel.end("the lane failed", is_ours=False)
        self.channels.clear()
        for party in self._inbound.values():
            party.link.close()
        self._inbound.clear()
        self._is_over = True
        self._obey()  # puts that came too late fail here
        self._fabric.close()
        self._listening.close()
        self._poll.close()
        self._owes_announcement = True
        self._announce(is_flying=False)
