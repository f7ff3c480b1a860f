"""What a router tells who watches it: asks its admin port, and adds up what has changed. One thread."""

from __future__ import annotations

from pdx.admin import parsed
from pdx.kv import bearer, post
from pdx.router.live.values import Live, RequestRow

PARTS_MAX = 64  # of a first answer: more than a router keeps


class Watched:
    """What a router has told so far: its last answer, and requests by number, the newest last."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self.now: Live | None = None
        self.requests: dict[int, RequestRow] = {}
        self.lost_at: float | None = None  # monotonic: since when it does not answer
        self.began_anew = 0
        self._headers = bearer(token)

    def look(self) -> None:
        """Asks until nothing is new. Raises Refused, DaemonGone."""
        for _ in range(PARTS_MAX):
            if not self._ask().more:
                break

    def _ask(self) -> Live:
        run, cursor = (self.now.run, self.now.next) if self.now is not None else ("", 0)
        raw = post(f"{self.url}/admin/live?run={run}&since={cursor}", None, self._headers)
        told = parsed(raw, Live, what=f"{self.url} tells something else")
        if run and told.run != run:
            self.requests.clear()
            self.began_anew += 1
        self.now = told
        self.requests.update({row.serial: row for row in told.requests})
        for serial in sorted(self.requests)[: -told.keeps]:
            del self.requests[serial]
        return told
