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

from pdx.errors import PdxError, PeerGone, WireError
from pdx.transport.api import Event, LaneFailed, PeerLost, PutFailed, Span
from pdx.transport.attention import LOOK_S, Attention
from pdx.transport.fabric import Fabric, Memory
from pdx.transport.link import Link
from pdx.transport.link_messages import LinkMessage, Shut
from pdx.transport.mailbox import Mailbox
from pdx.transport.onesided_door import Door, Outcome
from pdx.transport.onesided_ending import Ending
from pdx.transport.onesided_receiver import Grants, InboundPeer
from pdx.transport.onesided_sender import OneSidedChannel, OneSidedPut

logger = logging.getLogger(__name__)

# Fabrics copy while they are asked, so the thread asks without a pause at first: a slab is done by then, and on a busy
# machine the shortest sleep may last 4 ms. What takes longer is the network's; then it leaves its core to others.
SPIN_S = 1e-3
TRANSFER_POLL_S = 20e-6
# While something has a deadline, or a peer must take bytes.
TICK_S = 0.05
# A peer that ends without BYE was killed, or the network between us broke: its network card may go on for as long as it
# repeats a write, and it for as long as it waits for that (onesided_ending).
SETTLE_S = 30.0
# What a lost channel had under way has mostly ended by then.
HURRY_S = 0.2
# abort() waits no longer than this for what is under way, from us and into us.
WIND_DOWN_S = 2.0
# While puts follow puts, the control thread is not woken for every PutDone.
ANNOUNCE_EVERY_S = 0.001


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
        settle_s: float,
    ) -> None:
        self.channels: dict[int, OneSidedChannel] = {}
        self.grants = Grants(emit=self._emit)
        self._fabric = fabric
        self._mailbox = mailbox
        self._name = name
        self._stall_s = stall_s
        # In slices, so that a stop of this process shortens the wait by one slice only.
        self._settle_slices = round(settle_s / TICK_S)
        self._commands: deque[Callable[[], None]] = deque()
        self._inbound: dict[int, InboundPeer] = {}  # by descriptor
        self._outbound: dict[int, OneSidedChannel] = {}  # by descriptor
        self._endings: list[Ending] = []  # of channels that are lost
        self._settling: dict[int, int] = {}  # link number -> slices left
        self._link_count = 0
        self._unheard: set[int] = set()  # descriptors of peers that take no answers, and so are not listened to
        self._held_back: set[int] = set()  # descriptors of links that are not watched while the mailbox is full
        self._attention = Attention(stall_s)
        self._hurry_until_s = 0.0
        self._ticked_s = 0.0
        self._announced_s = 0.0
        self._owes_announcement = False
        self._is_stopped = False
        self._is_over = False
        self._drain_until_s: float | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._door = Door(listening, self._poll, scheme=scheme, key=key, name=name, stall_s=stall_s, call=self.call)
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
        self.channels[number] = OneSidedChannel(
            number, endpoint, fabric=self._fabric, emit=self._emit, check=self._attention.check
        )
        self._door.connect(endpoint, lambda outcome: self._connected(number, outcome))

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
        except Exception as error:
            logger.exception("%s: the lane failed; its peers are lost", self._name)
            self._end()
            self._mailbox.add(LaneFailed(f"internal error: {error!r}"))
        else:
            self._end()

    def _turn(self) -> None:
        ready = self._wait()
        self._look()
        self._run_commands()
        for descriptor, _ in ready:
            if descriptor == self._door.fileno():
                self._door.accept(self._accepted, link_count=len(self._inbound))
            elif descriptor in self._inbound:
                self._serve_inbound(descriptor, self._inbound[descriptor])
            elif descriptor in self._outbound:
                self._serve_outbound(self._outbound[descriptor])
        now = time.monotonic()
        for channel in list(self.channels.values()):
            self._guarded(channel, channel.advance, now)
        self._endings = [ending for ending in self._endings if not ending.advance(now)]
        self._tick(now)

    def _wait(self) -> list[tuple[int, int]]:
        is_flying = any(channel.is_flying or channel.is_eager for channel in self.channels.values())
        is_flying = is_flying or (bool(self._endings) and time.monotonic() < self._hurry_until_s)
        self._announce(is_flying=is_flying)
        if is_flying:
            if all(self._may_pause(channel) for channel in self.channels.values()):
                select.select([self._poll], [], [], TRANSFER_POLL_S)
            return self._poll.poll(0)
        if self._is_stopped or self._is_due():
            return self._poll.poll(TICK_S)
        return self._poll.poll(LOOK_S if any(channel.has_rights for channel in self.channels.values()) else None)

    def _look(self) -> None:
        """Before anything is posted."""
        for channel in [channel for channel in self.channels.values() if channel.has_rights]:
            self._guarded(channel, lambda _: self._attention.check(), 0.0)
        self._attention.look()

    def _is_due(self) -> bool:
        """Something has a deadline, or must be sent again and again, until a peer takes it."""
        return (
            bool(self._endings or self._settling or self._held_back or self._door.is_deaf)
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

    def _accepted(self, outcome: Outcome) -> None:
        if isinstance(outcome, str):
            logger.warning("%s: dropped a connection: %s", self._name, outcome)
            return
        self._link_count += 1
        party = InboundPeer(self._link_count, Link(outcome), grants=self.grants, fabric=self._fabric)
        self._inbound[party.link.fileno()] = party
        self._watch(party.link)

    def _connected(self, number: int, outcome: Outcome) -> None:
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
        if link.fileno() not in self._held_back:
            self._poll.unregister(link.fileno())
        self._held_back.discard(link.fileno())
        self._unheard.discard(link.fileno())

    def _heed(self, link: Link) -> None:
        """Listens to a peer, or, while it does not take what it asks for, only for that."""
        if link.is_congested:
            self._unheard.add(link.fileno())
            self._poll.modify(link.fileno(), select.EPOLLOUT)
        else:
            self._unheard.discard(link.fileno())
            self._poll.modify(link.fileno(), select.EPOLLIN)

    def _hold_back(self, link: Link) -> None:
        """What this peer has to say waits at its end, and nobody else does: _tick() watches it again."""
        self._poll.unregister(link.fileno())
        self._held_back.add(link.fileno())

    # --- peers that write into us ---

    def _serve_inbound(self, descriptor: int, party: InboundPeer) -> None:
        messages: list[LinkMessage] = []
        self._guarded_inbound(party, lambda: messages.extend(self._hear(party)))
        self._obey()  # a window that is asked for here may have been opened since this turn began
        if self._inbound.get(descriptor) is party:  # which a command may have ended: it is given nothing any more
            self._guarded_inbound(party, lambda: party.handle_all(messages))

    def _hear(self, party: InboundPeer) -> list[LinkMessage]:
        if party.is_refused:
            party.link.discard()
        elif party.link.is_congested or party.link.fileno() in self._unheard:
            party.link.flush()
            self._heed(party.link)
        elif self._mailbox.has_room:
            return party.link.receive()
        elif self._is_stopped:
            raise WireError("we are too far behind to take its notices")
        else:
            self._hold_back(party.link)
        return []

    def _guarded_inbound(self, party: InboundPeer, step: Callable[[], None]) -> None:
        try:
            step()
        except WireError as error:
            self._refuse(party, str(error))
        except (OSError, PeerGone) as error:
            self._end_inbound(party, error)
        except Exception as error:
            logger.exception("%s: serving a peer failed", self._name)
            self._refuse(party, f"internal error: {error!r}")

    def _refuse(self, party: InboundPeer, reason: str) -> None:
        """Hangs up. What it still writes it can't take back: its windows wait until it has hung up too."""
        logger.warning("%s: dropped a peer: %s", self._name, reason)
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
        self._settling[party.number] = self._settle_slices

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
        except (OSError, PdxError) as error:
            self._lose(channel, str(error))
        except Exception as error:
            logger.exception("%s: the channel to %s failed", self._name, channel.endpoint)
            self._lose(channel, f"internal error: {error!r}")

    def _lose(self, channel: OneSidedChannel, reason: str, *, is_ours: bool = False) -> None:
        now = time.monotonic()
        del self.channels[channel.number]
        if channel.link is not None:
            self._unwatch(channel.link)
            del self._outbound[channel.link.fileno()]
        ending = channel.retire(reason, is_ours=is_ours, now=now)
        if not ending.advance(now):
            self._endings.append(ending)
            self._hurry_until_s = now + HURRY_S

    # --- deadlines and the end ---

    def _tick(self, now: float) -> None:
        if now < self._ticked_s + TICK_S:
            return
        self._ticked_s = now
        self._door.listen_again()
        if self._mailbox.has_room or self._is_stopped:
            for descriptor in self._held_back:
                self._watch(self._inbound[descriptor].link)
            self._held_back.clear()
        for number, slices_left in list(self._settling.items()):
            if slices_left:
                self._settling[number] = slices_left - 1
            else:
                del self._settling[number]
                self.grants.link_is_quiet(number)
        for channel in list(self.channels.values()):
            if not self._attention.is_patient(now) and channel.is_stuck(self._attention.looked_s, self._stall_s):
                self._lose(channel, f"peer did not move in {self._stall_s:g} s")
            elif channel.link is not None:
                self._guarded(channel, lambda at, link=channel.link: self._flush(link, at), now)  # type: ignore[misc]
        for party in list(self._inbound.values()):
            try:
                party.link.flush()  # without a deadline: one that is stopped may still have to drain
            except OSError as error:
                self._end_inbound(party, error)

    def _flush(self, link: Link, now: float) -> None:
        link.flush()
        if link.is_stuck(now, self._stall_s) and not self._attention.is_patient(now):
            raise PeerGone("peer takes no messages any more")

    def _wind_down(self) -> None:
        """Sends what is queued, ends what is under way, and waits until nobody writes into us."""
        assert self._drain_until_s is not None
        self._run_commands()  # puts that came before stop()
        while time.monotonic() < self._drain_until_s and not all(c.is_idle for c in self.channels.values()):
            self._turn()
        self._door.close()
        for channel in list(self.channels.values()):
            self._lose(channel, "the lane was closed", is_ours=True)
        for party in list(self._inbound.values()):
            try:
                party.link.finish()
            except OSError as error:
                self._end_inbound(party, error)
        deadline_s = time.monotonic() + WIND_DOWN_S
        while (self._inbound or self._endings or self._door.is_greeting) and time.monotonic() < deadline_s:
            self._turn()

    def _end(self) -> None:
        """Whatever fails on the way, every put ends; none before the fabric is closed, and so touches no memory."""
        self._is_stopped = True
        for channel in self.channels.values():
            self._endings.append(channel.retire("the lane failed", is_ours=False, now=time.monotonic()))
        self.channels.clear()
        for party in self._inbound.values():
            party.link.close()
        self._inbound.clear()
        try:
            self._fabric.close()
        except Exception:
            logger.exception("%s: the fabric does not close", self._name)
        for ending in self._endings:
            ending.end_now()
        self._endings.clear()
        self._door.end()
        self._is_over = True
        while self._commands:  # puts that came too late fail here
            try:
                self._obey()
            except Exception:
                logger.exception("%s: a command failed", self._name)
        self._poll.close()
        self._owes_announcement = True
        self._announce(is_flying=False)
