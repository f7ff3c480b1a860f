"""Which of two daemons' common lanes their handoffs take, and in words why. Pure.

Each daemon tells its lanes, best first, and the RDMA devices they use; the sender chooses. A lane that is not tcp is
only better than tcp where both ends have RDMA, so by itself ("auto") it is taken only there. An operator who names a
lane gets it wherever the peer has it too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from pdx.errors import UnknownTransport
from pdx.wire import LaneOffer

AUTO = "auto"
TCP = "tcp"


class Choice(msgspec.Struct, frozen=True):
    """The lane for a pair, as the peer offers it; the devices at our end; and in one sentence why not a better one."""

    endpoint: str
    scheme: str
    devices: tuple[str, ...]
    reason: str


def choose(
    ours: Sequence[LaneOffer],
    theirs: Sequence[LaneOffer],
    *,
    transport: str = AUTO,
    require_rdma: bool = False,
    resting: Collection[str] = (),
    absent: Sequence[str] = (),
) -> Choice:
    """The first of our lanes that the pair can have.

    `resting`: endpoints of the peer's that failed lately; one of them is taken only if there is no other. `absent`:
    why we have no better lanes than `ours`, for the sentence. Raises UnknownTransport, with the same sentence, if the
    two have no lane in common.
    """
    offered = {offer.scheme: offer for offer in reversed(theirs)}
    reasons = list(absent)
    last_resort: Choice | None = None
    for our in ours:
        scheme, their = our.scheme, offered.get(our.scheme)
        if their is None:
            reasons.append(f"the peer has no {scheme}")
            continue
        over_rdma = bool(our.devices and their.devices)
        if not over_rdma and (require_rdma or (transport == AUTO and scheme != TCP)):
            reasons.append(f"{scheme} has no RDMA {'here' if not our.devices else 'at the peer'}")
        elif their.endpoint in resting:
            reasons.append(f"{scheme} failed between the two")
            last_resort = last_resort or Choice(their.endpoint, scheme, tuple(our.devices), "")
        else:
            why = "RDMA at both ends" if over_rdma else "asked for" if transport == scheme else ""
            return Choice(their.endpoint, scheme, tuple(our.devices), _sentence([*reasons, why]))
    if last_resort is not None:
        sentence = _sentence([*reasons, "there is no other"])
        return msgspec.structs.replace(last_resort, reason=sentence)
    raise UnknownTransport(f"no common lane: {_sentence(reasons) or 'we have none'}")


def _sentence(reasons: Sequence[str]) -> str:
    return ", ".join(filter(None, reasons))
