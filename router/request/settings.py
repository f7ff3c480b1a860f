"""How a router serves. A value, the same for all journeys."""

from __future__ import annotations

from typing import Literal

import msgspec

from pdx.router.choice.policy import PolicyName
from pdx.wire import Budgets

JourneyName = Literal["auto", "seeded", "paired", "after"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all journeys of a router."""

    cluster_key: bytes
    policy: PolicyName = "prefix"
    journey: JourneyName = "auto"
    budgets: Budgets = Budgets()
    prefill_timeout_s: float = 120.0
    max_waiting: int = 32  # requests in line at one engine; 0 is no limit
    max_wait_s: float = 0.0  # predicted at one engine, beyond which a request is turned away; 0 is no limit
    max_in_flight_prefill: int = 0  # of this router's calls at one engine of this role; 0 is no limit
    max_in_flight_decode: int = 0  # the same, also for engines of both roles
    retries: int = 2  # of one request, on other engines
