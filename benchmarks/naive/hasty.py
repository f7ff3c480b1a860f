"""The naive variant of quarantine: a pdxd that takes an engine's slots back as soon as its lease is over.

It waits for no fence and no LET_GO, and is pdxd as it is in every other respect. Run as
`python -m benchmarks.naive.hasty`, with pdxd's own flags.
"""

from __future__ import annotations

import sys

from pdx.buffer import store
from pdx.buffer.lease import Lease
from pdx.daemon import main as daemon


class HastyStore(store.Store):
    def expire(self, now: float) -> list[Lease]:
        expired = super().expire(now)
        for lease in expired:
            self.quiesce(lease)
        return expired


def main() -> int:
    vars(store)["Store"] = HastyStore
    return daemon.main()


if __name__ == "__main__":
    sys.exit(main())
