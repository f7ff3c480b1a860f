"""The naive variant of quarantine: a pdxd that takes the slots of a failed handoff back at once.

It waits for no fence, no LET_GO and no window to close. It is pdxd as it is in every other respect. Run as
`python -m benchmarks.naive.hasty`, with pdxd's own flags.
"""

from __future__ import annotations

import sys

from pdx.buffer import store
from pdx.buffer.claim import Claim
from pdx.daemon import main as daemon


class HastyStore(store.Store):
    def abandon(self, claim: Claim) -> None:
        super().abandon(claim)
        slots = set(claim.fresh_slots)
        for lease in list(self.leases.values()):
            if not slots.isdisjoint(lease.slots):
                self.revoke(lease)
                self.quiesce(lease)


def main() -> int:
    vars(store)["Store"] = HastyStore
    return daemon.main()


if __name__ == "__main__":
    sys.exit(main())
