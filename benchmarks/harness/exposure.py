"""What of a handoff's transfer its request had to wait for, read from the two daemons' traces. Pure.

*Computed* is when the last layer of the last prompt chunk stood in its slots; *exposed* is what came after that, until
the last page had landed. The last slabs are the pages of that last layer in that last chunk: no protocol can send them
earlier, since they do not exist, so their time on the wire can't be hidden. Everything else can, if the link is faster
than the engine; if it is slower, at least the wire's whole time less computing's is exposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

HIDDEN_SLACK_S = 0.005  # the bar of a link that is faster than the engine: the last slabs' time and so much
SLOW_LINK_FACTOR = 1.1  # and of one that is slower: so many times what can't be hidden


@dataclass(frozen=True)
class Exposure:
    """One handoff."""

    total_bytes: int
    last_slabs_bytes: int
    compute_s: float  # from the first forward step's start to the last layer filled
    exposed_s: float

    @property
    def production_bytes_per_s(self) -> float:
        return self.total_bytes / self.compute_s

    def allowed_s(self, rho: float, link_bytes_per_s: float) -> float:
        """How much may be exposed on a link of this rate, where `rho` is production / link."""
        hidden_s = self.last_slabs_bytes / link_bytes_per_s + HIDDEN_SLACK_S
        if rho < 1:
            return hidden_s
        # A handoff that was computed so slowly that the link kept up is judged as one on a fast link.
        return max(hidden_s, SLOW_LINK_FACTOR * (self.total_bytes / link_bytes_per_s - self.compute_s))


def read_exposure(events: Iterable[dict[str, Any]], *, page_bytes: int) -> Exposure | None:
    """One handoff's, from the events of both daemons; None unless every page that was put has landed."""
    ordered = sorted(events, key=lambda event: event["at_ns"])
    filled = [event for event in ordered if event["what"] == "filled"]
    landed = [event for event in ordered if event["what"] == "landed"]
    pages_put = sum(event["pages"] for event in ordered if event["what"] == "put")
    pages_landed = sum(event["pages"] for event in landed)
    if not filled or not landed or pages_landed < pages_put:
        return None
    last = filled[-1]
    last_slabs = [event for event in filled if (event["step"], event["layer"]) == (last["step"], last["layer"])]
    return Exposure(
        total_bytes=pages_landed * page_bytes,
        last_slabs_bytes=sum(event["pages"] for event in last_slabs) * page_bytes,
        compute_s=(last["at_ns"] - filled[0]["step_started_ns"]) / 1e9,
        exposed_s=max(0, landed[-1]["at_ns"] - last["at_ns"]) / 1e9,
    )
