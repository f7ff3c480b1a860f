"""What is said to a reader who has stopped, and to one who comes back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from pdx.launch import screen
from pdx.launch.screen import WAITING_CHARS_MAX, Screen
from pdx.launch.supervise import ChildDied, Supervisor

WAIT_S = 20.0
LINE = "x" * 65536


@pytest.fixture
def stuck() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe that takes nothing more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    yield reader, writer


def test_a_reader_who_has_stopped_holds_up_nothing(stuck: tuple[int, int]) -> None:
    reader, writer = stuck
    with os.fdopen(writer, "w") as out, Supervisor(out=out) as supervisor:
        supervisor.start("a", ["echo", "x"])
        with pytest.raises(ChildDied):
            supervisor.wait(WAIT_S)
        os.close(reader)  # else its end would wait for a while


def test_what_is_left_out_is_counted_where_it_would_stand(
    stuck: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "LEAVE_S", WAIT_S)  # this reader takes all, however slow the machine
    reader, writer = stuck
    with os.fdopen(writer, "w") as out, os.fdopen(reader, encoding="utf-8") as back:
        on_screen = Screen(out)
        on_screen.start()
        fit = WAITING_CHARS_MAX // len(LINE)
        for _ in range(3 * fit):  # what the thread is writing counts no more: twice as much may fit
            on_screen.say(LINE)
        read: list[str] = []
        reading = threading.Thread(target=lambda: read.extend(back))
        reading.start()
        on_screen.stop()
        on_screen.say("the end")
        out.close()
        reading.join(WAIT_S)
    lines = [line.strip("\0\n") for line in read]
    notes = [line for line in lines if "lines are left out here" in line]
    left_out = sum(int(note.split()[1]) for note in notes)
    assert left_out and notes[-1] == lines[-2] and lines[-1] == "the end"
    assert lines.count(LINE) == 3 * fit - left_out >= fit
