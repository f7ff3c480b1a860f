"""How large the frames of one connection may be: what it carries in two milliseconds. Pure: times are passed in.

An urgent put waits for the frame under way and for as much that is not sent yet, whatever the link; a fast one is not
filled by small frames, since each costs both sides system calls and a wake-up.
"""

from __future__ import annotations

from pdx.transport.frames import FRAME_BYTES_MAX

FRAME_S = 0.002
# Before anything is known, 2 ms at 1 Gbit/s. The least is also the step; 3 ms at 200 Mbit/s.
FIRST_FRAME_BYTES = 256 << 10
STEP_BYTES = 64 << 10
# Long enough that what the kernel takes into its buffers at once does not look like a fast link.
LOOK_S = 0.02
# Sending that began so long after the last frame says nothing about the time between.
PAUSE_S = 0.001


class Pace:
    """Owned by the connection's sending thread. A rate is that of a stretch of frames without pauses."""

    def __init__(self) -> None:
        self.frame_bytes = FIRST_FRAME_BYTES
        self._since_s = self._last_s = 0.0
        self._sent_bytes = 0

    def sent(self, frame_bytes: int, *, began_s: float, ended_s: float) -> bool:
        """One frame was handed to the kernel. Whether `frame_bytes` has changed."""
        if began_s > self._last_s + PAUSE_S:
            self._since_s, self._sent_bytes = began_s, 0
        self._last_s = ended_s
        self._sent_bytes += frame_bytes
        if ended_s < self._since_s + LOOK_S:
            return False
        carried_bytes = int(self._sent_bytes / (ended_s - self._since_s) * FRAME_S) // STEP_BYTES * STEP_BYTES
        self._since_s, self._sent_bytes = ended_s, 0
        before, self.frame_bytes = self.frame_bytes, min(max(carried_bytes, STEP_BYTES), FRAME_BYTES_MAX)
        return self.frame_bytes != before
