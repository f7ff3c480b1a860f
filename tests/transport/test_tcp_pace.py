"""Frames grow with what a connection carries, and shrink with it."""

from __future__ import annotations

import pytest

from pdx.transport.frames import FRAME_BYTES_MAX
from pdx.transport.pace import FIRST_FRAME_BYTES, LOOK_S, PAUSE_S, STEP_BYTES, Pace


def send(pace: Pace, *, bytes_per_s: float, seconds: float, at_s: float = 1.0, gap_s: float = 0.0) -> float:
    """Frames one after the other, `gap_s` apart; returns when they are over."""
    end_s = at_s + seconds
    while at_s < end_s:
        ended_s = at_s + pace.frame_bytes / bytes_per_s
        pace.sent(pace.frame_bytes, began_s=at_s, ended_s=ended_s)
        at_s = ended_s + gap_s
    return at_s


@pytest.mark.parametrize(
    ("bytes_per_s", "frame_bytes"),
    [(25e6, STEP_BYTES), (118e6, 192 << 10), (300e6, 576 << 10), (1.25e9, FRAME_BYTES_MAX), (9e9, FRAME_BYTES_MAX)],
)
def test_a_frame_is_what_the_connection_carries_in_two_milliseconds(bytes_per_s: float, frame_bytes: int) -> None:
    pace = Pace()
    send(pace, bytes_per_s=bytes_per_s, seconds=5 * LOOK_S)
    assert pace.frame_bytes == frame_bytes


def test_frames_shrink_when_the_connection_slows_down() -> None:
    pace = Pace()
    at_s = send(pace, bytes_per_s=2e9, seconds=3 * LOOK_S)
    assert pace.frame_bytes == FRAME_BYTES_MAX
    send(pace, bytes_per_s=25e6, seconds=4 * LOOK_S, at_s=at_s)
    assert pace.frame_bytes == STEP_BYTES


def test_pauses_say_nothing_about_the_connection() -> None:
    """A few frames now and then go into the kernel's buffers as fast as memory is; that is no fast link."""
    pace = Pace()
    send(pace, bytes_per_s=5e9, seconds=20 * LOOK_S, gap_s=2 * PAUSE_S)
    assert pace.frame_bytes == FIRST_FRAME_BYTES


def test_it_says_when_a_frame_changes() -> None:
    pace = Pace()
    changes = [pace.sent(1 << 20, began_s=n * 0.001, ended_s=(n + 1) * 0.001) for n in range(60)]
    assert changes.count(True) == 1
    assert pace.frame_bytes == 1 << 20
