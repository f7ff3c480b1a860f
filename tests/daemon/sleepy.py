"""A pdxd that never looks around by itself: only what wakes it is heard. Run as `python sleepy.py`, with its flags."""

from __future__ import annotations

import sys

from pdx.daemon import lanewatch, main, service

if __name__ == "__main__":
    service.TICK_S = lanewatch.LANES_S = 3600.0
    sys.exit(main.main())
