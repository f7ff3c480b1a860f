"""What chaos asks and breaks, drawn from a seed: which question in which way, and which fault at whom in which phase.

Pure. The seed fixes what is drawn, not the timing: a fault waits until its victim is there and its phase is seen.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from benchmarks.chaos.questions import TOKENS_MIN, Known

Kind = Literal["kill", "stop", "cut", "leave"]
Phase = Literal["sent", "prefill", "handover", "decode", "any"]
Piece = Literal["all", "api", "core", "worker"]

PREFILLS, DECODES, DAEMONS = ("P0", "P1"), ("D0", "D1"), ("pdxd-a", "pdxd-b")
ENGINES = (*PREFILLS, *DECODES)
ROUTER, CLIENT, WIRE = "router", "client", "wire"
CONTROLS = ("control-a", "control-b")  # a host's way to the router
ROLES = ("prefill", "decode")  # all engines of a role at once
PHASES: tuple[Phase, ...] = ("sent", "prefill", "handover", "decode", "any")

# Of a hundred faults. A killed engine costs some 25 CPU seconds to come back; the rest costs nothing.
SHARES: tuple[tuple[Kind, tuple[str, ...], int], ...] = (
    ("kill", ENGINES, 13),
    ("kill", ROLES, 2),
    ("kill", DAEMONS, 8),
    ("kill", (ROUTER,), 5),
    ("stop", ENGINES, 16),
    ("stop", DAEMONS, 10),
    ("stop", (ROUTER,), 6),
    ("cut", (WIRE,), 12),
    ("cut", CONTROLS, 10),
    ("leave", (CLIENT,), 18),
)
STOP_S = (0.5, 8.0)  # shorter and longer than leases and budgets
CUT_S = (0.2, 8.0)
DEAD_S = (0.0, 4.0)  # until somebody starts it again
STREAMED, UNSEEDABLE, USAGE_ASKED = 0.6, 0.25, 0.3  # chances


class Wish(msgspec.Struct, frozen=True):
    """One request of a client."""

    number: int
    question: int  # index into the pool
    max_tokens: int
    streamed: bool
    unseedable: bool  # it cannot begin with prefill's token
    usage_asked: bool


class Fault(msgspec.Struct, frozen=True):
    """One thing that goes wrong. `seconds`: how long it lasts, or how long the victim stays dead."""

    number: int
    kind: Kind
    target: str
    phase: Phase
    seconds: float
    piece: Piece = "all"  # which processes of an engine
    way: int = 0  # of several ways to cut a link

    def __str__(self) -> str:
        piece = f" ({self.piece})" if self.piece != "all" else ""
        return f"fault {self.number}: {self.kind} {self.target}{piece} for {self.seconds:.1f} s, at {self.phase}"


def wish(number: int, *, seed: int, pool: Sequence[Known]) -> Wish:
    generator = random.Random(f"{seed}/wish/{number}")
    question = generator.randrange(len(pool))
    most = pool[question].tokens
    return Wish(
        number=number,
        question=question,
        max_tokens=generator.randint(min(TOKENS_MIN, most), most),
        streamed=generator.random() < STREAMED,
        unseedable=generator.random() < UNSEEDABLE,
        usage_asked=generator.random() < USAGE_ASKED,
    )


def faults(count: int, *, seed: int) -> list[Fault]:
    """Every kind in its share; victims and phases of a kind go round, so that few faults already meet many of them."""
    generator = random.Random(f"{seed}/faults")
    drawn: list[Fault] = []
    for kind, targets, share in SHARES:
        meetings = list(itertools.product(PHASES, targets))
        generator.shuffle(meetings)
        for phase, target in itertools.islice(itertools.cycle(meetings), max(1, round(count * share / 100))):
            drawn.append(_fault(generator, kind, target, phase))
    generator.shuffle(drawn)
    while len(drawn) < count:
        drawn.append(msgspec.structs.replace(generator.choice(drawn)))
    return [msgspec.structs.replace(fault, number=number) for number, fault in enumerate(drawn[:count])]


def next_fault(waiting: Iterable[Fault], *, unwell: frozenset[str]) -> Fault | None:
    """The first whose victim is well and whose death would not end the last engine of a role, roles' own excepted."""
    return next((fault for fault in waiting if _may(fault, unwell)), None)


def _may(fault: Fault, unwell: frozenset[str]) -> bool:
    if fault.kind == "kill" and fault.target in ROLES:
        return not unwell & set(ENGINES)
    if fault.kind == "kill" and fault.target in ENGINES:
        peers = PREFILLS if fault.target in PREFILLS else DECODES
        return not unwell & set(peers)
    return fault.target not in unwell


def _fault(generator: random.Random, kind: Kind, target: str, phase: Phase) -> Fault:
    spans = {"kill": DEAD_S, "stop": STOP_S, "cut": CUT_S, "leave": (0.0, 0.0)}
    pieces: tuple[Piece, ...] = ("all", "api", "core", "worker") if target in ENGINES else ("all",)
    return Fault(
        0, kind, target, phase, generator.uniform(*spans[kind]), generator.choice(pieces), generator.randrange(4)
    )
