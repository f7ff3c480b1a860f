"""Who takes part: engines, daemons, and how long each gives the other. Values, part of many messages.

`wire` has them too, for all who speak.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from pdx.keys import ContentFingerprint, LayoutFingerprint

Role = Literal["prefill", "decode", "both"]
# Network cards of one lane that are told: hosts with eight GPUs have eight or nine.
DEVICES_MAX = 16
# Bounded so that it is a number: no NaN, no infinity. Engines heed handles that nobody has verified yet.
Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e9)]


class EngineInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the fleet knows of one engine."""

    engine_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    role: Role
    model: str
    url: str = ""  # the OpenAI-compatible HTTP server; empty: not to be routed to
    data_parallel_rank: int | None = None  # by which its server tells it from others behind the same URL; None: alone
    reasoning_parser: str = ""  # the engine splits its output by this; it must see every token of an answer
    context_tokens: int = 0  # a prompt and its answer have at most so many together; 0: not told
    sampling_defaults: dict[str, float] = {}  # by vLLM's names; what holds where a request says nothing
    adapters: dict[str, str] = {}  # digests of LoRA adapters that are served as models of these names
    # vLLM's prefix caching is on. Where it is off, blocks are named otherwise (`keys.private_salt`).
    shares_blocks: bool = True
    content: ContentFingerprint
    layout: LayoutFingerprint

    @property
    def models(self) -> list[str]:
        """The names under which requests may come."""
        return [self.model, *self.adapters]

    def at(self, epoch: str) -> EngineInfo:
        """The same engine with weights of this epoch."""
        content = msgspec.structs.replace(self.content, weight_epoch=epoch)
        return msgspec.structs.replace(self, content=content)

    def completed_by(self, scheduler: EngineInfo) -> EngineInfo:
        """The same engine with what only its scheduler's process knows: of all ranks' weights, and of caching."""
        known = self.at(scheduler.content.weight_epoch)
        return msgspec.structs.replace(known, shares_blocks=scheduler.shares_blocks)


class LaneOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One lane by which a pdxd can be written to."""

    endpoint: str  # a URL; its scheme names the lane
    devices: Annotated[list[str], msgspec.Meta(max_length=DEVICES_MAX)] = []  # RDMA, that it uses there; empty: none

    @property
    def scheme(self) -> str:
        return self.endpoint.partition("://")[0]


class DaemonRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to reach one pdxd. A restarted daemon has a new incarnation."""

    daemon_id: str  # of one life; see `host_of`
    incarnation: int
    control: str  # zmq endpoint of its peer socket
    lanes: list[LaneOffer]  # best first


class Budgets(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long each side of a handoff may take. Durations: every process counts them on its own clock."""

    grant_s: Seconds = 10.0  # from RESERVE to GRANT
    slab_s: Seconds = 15.0  # without a slab, and without word that the request still waits for the prefill engine
    total_s: Seconds = 120.0  # from RESERVE to COMMIT
    claim_s: Seconds = 3.0  # from COMMIT until the decode engine owns the pages


def host_of(daemon_id: str) -> str:
    """What stays of it when a daemon of the same run directory follows: for what is drawn over time, and for people.

    Two daemons may share it; nothing but their ids tells them apart.
    """
    return daemon_id.rpartition("/")[0] or daemon_id
