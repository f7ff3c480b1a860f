"""How fast puts reach each peer: measured from submitting a put to its end, no second of a peer's counted twice."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from pdx.rates import Busy, Rate
from pdx.wire import LinkRate

PEERS_MAX = 256  # of whom rates are remembered, those used last


@dataclass
class _Link:
    busy: Busy = field(default_factory=Busy)
    rate: Rate = field(default_factory=Rate)


@dataclass(frozen=True, slots=True)
class Underway:
    """One put."""

    peer: str  # its daemon's id
    size_bytes: int
    began_at: float


class Links:
    """Owned by the control thread."""

    def __init__(self) -> None:
        self._links: OrderedDict[str, _Link] = OrderedDict()

    def ended(self, put: Underway, now: float, *, ok: bool) -> None:
        link = self._links.setdefault(put.peer, _Link())
        self._links.move_to_end(put.peer)
        if len(self._links) > PEERS_MAX:
            self._links.popitem(last=False)
        seconds = link.busy.ended(began_at=put.began_at, now=now)
        if ok:
            link.rate.measured(put.size_bytes, seconds=seconds, now=now)

    def rates(self) -> list[LinkRate]:
        return [
            LinkRate(daemon_id=peer, bytes_per_s=per_s)
            for peer, link in self._links.items()
            if (per_s := link.rate.per_s) is not None
        ]
