"""The states of a handoff, as data. Nothing outside this file decides what follows what.

Theory of operation. A handoff has two halves, one in each daemon, and no shared truth between them: only messages
that may come late, twice or never. Each half therefore ends by itself. It starts when a handle is used, and it ends
after every hold that it took on slots has become harmless, in one of two ways: *settled* (every page in place,
COMMIT and COMMITTED exchanged) or *failed*. Failing is not an instant but a state: the sender drains its puts
(DRAINING), the receiver closes its window and waits for its engine to let go (FAILING). Only then are slots free.

`fail` can come in every state but the last, for any reason, any number of times; the first reason is the one kept.
Every state that waits for somebody else has a budget, counted on this process's own clock (see `Budgets`).
"""

from __future__ import annotations

import enum
from typing import TypeVar

from pdx.errors import IllegalTransition


class Sending(enum.Enum):
    """The half in the prefill engine's daemon."""

    CLAIMING = "claiming"  # the arena is full: first in, first out
    RESERVING = "reserving"  # slots claimed, engine may compute; RESERVE sent, GRANT awaited
    SENDING = "sending"  # the window is known: pages go out as they are filled
    COMMITTING = "committing"  # all pages out, COMMIT sent
    SETTLED = "settled"  # COMMITTED came; the engine may still hold its lease
    DRAINING = "draining"  # failed; puts under way may still read our slots
    ENDED = "ended"


class Receiving(enum.Enum):
    """The half in the decode engine's daemon."""

    WAITING = "waiting"  # the arena is full: WAIT sent, first in, first out
    GRANTED = "granted"  # window open, pages landing, the engine may already read
    LANDED = "landed"  # every page in and checked, COMMITTED sent
    FAILING = "failing"  # window closing, engine letting go
    ENDED = "ended"


SENDING = {
    (Sending.CLAIMING, "claimed"): Sending.RESERVING,
    (Sending.CLAIMING, "fail"): Sending.ENDED,
    (Sending.RESERVING, "granted"): Sending.SENDING,
    (Sending.RESERVING, "fail"): Sending.DRAINING,
    (Sending.SENDING, "all_sent"): Sending.COMMITTING,
    (Sending.SENDING, "fail"): Sending.DRAINING,
    (Sending.COMMITTING, "committed"): Sending.SETTLED,
    (Sending.COMMITTING, "fail"): Sending.DRAINING,
    (Sending.DRAINING, "drained"): Sending.ENDED,
    (Sending.SETTLED, "let_go"): Sending.ENDED,
}

RECEIVING = {
    (Receiving.WAITING, "claimed"): Receiving.GRANTED,
    (Receiving.WAITING, "fail"): Receiving.ENDED,
    (Receiving.GRANTED, "all_landed"): Receiving.LANDED,
    (Receiving.GRANTED, "fail"): Receiving.FAILING,
    (Receiving.LANDED, "let_go"): Receiving.ENDED,
    (Receiving.LANDED, "fail"): Receiving.FAILING,
    (Receiving.FAILING, "quiet"): Receiving.ENDED,
}

S = TypeVar("S", Sending, Receiving)


def after(table: dict[tuple[S, str], S], state: S, event: str) -> S:
    """The state that follows. Raises IllegalTransition; the caller's state is unchanged."""
    try:
        return table[state, event]
    except KeyError:
        raise IllegalTransition(f"{type(state).__name__}: {event!r} is not possible in state {state.value!r}") from None
