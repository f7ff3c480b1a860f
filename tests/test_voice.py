"""Voice: several threads on one connection, which ends with the last of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pdx.errors import DaemonGone
from pdx.voice import Voice
from pdx.wire import ENGINE, LetGo, decoder_of

_decode = decoder_of(ENGINE)


@pytest.fixture
def ends() -> Iterator[tuple[Voice, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    voice = Voice(ours)
    yield voice, theirs
    voice.close()
    theirs.close()


def word(number: int) -> LetGo:
    return LetGo(handoff_id=bytes(16), side="send", fence=number, ok=True)


def heard(theirs: socket.socket) -> list[int]:
    fences = []
    while True:
        try:
            frame = theirs.recv(1 << 16)
        except BlockingIOError:
            return fences
        if not frame:
            return [*fences, -1]  # its end
        message = _decode(frame)
        assert isinstance(message, LetGo)
        fences.append(message.fence)


def test_the_daemon_sees_the_end_when_the_last_voice_is_closed(ends: tuple[Voice, socket.socket]) -> None:
    voice, theirs = ends
    other = voice.another()
    voice.send(word(1))
    voice.close()
    other.send(word(2))
    assert heard(theirs) == [1, 2]
    other.close()
    assert heard(theirs) == [-1]


def test_what_finds_no_room_is_sent_later_in_its_order(ends: tuple[Voice, socket.socket]) -> None:
    voice, theirs = ends
    for number in range(2000):
        voice.send(word(number))
    first = heard(theirs)
    assert len(first) < 2000
    voice.finish_sending(timeout_s=0.0)
    everything = first
    while len(everything) < 2000:
        voice.finish_sending(timeout_s=0.01)
        more = heard(theirs)
        assert more
        everything += more
    assert everything == list(range(2000))


def test_each_voice_finds_out_by_itself_that_the_daemon_is_gone(ends: tuple[Voice, socket.socket]) -> None:
    voice, theirs = ends
    other = voice.another()
    theirs.close()
    for each in (voice, other):
        assert not each.alive
        with pytest.raises(DaemonGone):
            each.send(word(1))
    other.close()
