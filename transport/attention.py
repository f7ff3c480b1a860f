"""For how long a one-sided lane's thread was away: stopped, starved, or asleep with its whole host.

Who was away can't say that others stood still, and its rights may have ended: peers take a host that says nothing for
dead, wait until its network is sure to be quiet (reactor.SETTLE_S), and use their slots anew.
"""

from __future__ import annotations

import time

from pdx.errors import PeerGone

# A small part of what peers wait. Who may write looks several times in it, even if there is nothing to do.
AWAY_S = 10.0
LOOK_S = 1.0


class Attention:
    """Owned by the reactor's thread."""

    def __init__(self, stall_s: float) -> None:
        self.looked_s = time.monotonic()
        self._stall_s = stall_s
        self._patient_until_s = 0.0
        self._looked_boot_s = _boot_s()

    def look(self) -> None:
        """In every turn. Who was away gives its peers their time anew."""
        now = time.monotonic()
        if now > self.looked_s + self._stall_s / 2:
            self._patient_until_s = now + self._stall_s
        self.looked_s = now
        self._looked_boot_s = _boot_s()

    def is_patient(self, now: float) -> bool:
        return now <= self._patient_until_s

    def check(self) -> None:
        """Before anything is written. Raises PeerGone if rights from before the last look() may have ended since."""
        away_s = _boot_s() - self._looked_boot_s
        if away_s > AWAY_S:
            raise PeerGone(f"this lane stood still for {away_s:.0f} s: its peers may have taken it for dead")


def _boot_s() -> float:
    """Unlike the monotonic clock this one counts the time in which the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
