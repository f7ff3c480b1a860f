"""The states of a journey, the moves between them, and in which of them events may come. `journey` explains them."""

from __future__ import annotations

from typing import Literal

from pdx.router.request.actions import (
    Begin,
    DecodeAnswered,
    DecodeFailed,
    HandoffBroke,
    PrefillAnswered,
    PrefillFailed,
    TurnedAway,
)

State = Literal[
    "choosing", "queued", "prefilling", "both", "seeding", "reseeding", "decoding", "alone", "retrying", "overtaking",
    "streaming", "ended",
]  # fmt: skip

MOVES: dict[tuple[State, str], State] = {
    ("choosing", "pair"): "prefilling",
    ("choosing", "both"): "both",
    ("choosing", "alone"): "alone",
    ("choosing", "line_up"): "queued",
    ("choosing", "reject"): "ended",
    ("queued", "line_up"): "queued",
    ("queued", "pair"): "prefilling",
    ("queued", "both"): "both",
    ("queued", "alone"): "alone",
    ("queued", "reject"): "ended",
    ("prefilling", "seed"): "seeding",
    ("prefilling", "prefilled"): "decoding",
    ("prefilling", "fall_back"): "alone",
    ("prefilling", "answer"): "ended",
    ("prefilling", "reject"): "ended",
    ("both", "prefilled"): "decoding",
    ("both", "fall_back"): "alone",
    ("both", "first_byte"): "overtaking",
    ("both", "answer"): "ended",
    ("both", "retry"): "retrying",
    ("both", "reject"): "ended",
    ("seeding", "first_byte"): "streaming",
    ("seeding", "answer"): "ended",
    ("seeding", "retry"): "reseeding",
    ("seeding", "reject"): "ended",
    ("seeding", "break"): "ended",
    ("reseeding", "first_byte"): "streaming",
    ("reseeding", "retry"): "reseeding",
    ("reseeding", "answer"): "ended",
    ("reseeding", "reject"): "ended",
    ("reseeding", "break"): "ended",
    ("decoding", "first_byte"): "streaming",
    ("decoding", "answer"): "ended",
    ("decoding", "retry"): "retrying",
    ("decoding", "reject"): "ended",
    ("alone", "first_byte"): "streaming",
    ("alone", "answer"): "ended",
    ("alone", "retry"): "retrying",
    ("alone", "reject"): "ended",
    ("retrying", "first_byte"): "streaming",
    ("retrying", "retry"): "retrying",
    ("retrying", "answer"): "ended",
    ("retrying", "reject"): "ended",
    ("overtaking", "prefilled"): "streaming",
    ("overtaking", "fall_back"): "streaming",
    ("overtaking", "finish"): "ended",
    ("overtaking", "break"): "ended",
    ("streaming", "finish"): "ended",
    ("streaming", "break"): "ended",
    ("queued", "leave"): "ended",
    ("prefilling", "leave"): "ended",
    ("both", "leave"): "ended",
    ("seeding", "leave"): "ended",
    ("reseeding", "leave"): "ended",
    ("decoding", "leave"): "ended",
    ("alone", "leave"): "ended",
    ("retrying", "leave"): "ended",
    ("overtaking", "leave"): "ended",
    ("streaming", "leave"): "ended",
}

# A call that is not under way says nothing.
_PREFILL: frozenset[State] = frozenset({"prefilling", "both", "overtaking"})
_DECODE: frozenset[State] = frozenset({"both", "seeding", "reseeding", "decoding", "alone", "retrying"})
HEARD: dict[type, frozenset[State]] = {
    Begin: frozenset({"choosing", "queued"}),
    TurnedAway: frozenset({"queued"}),
    PrefillAnswered: _PREFILL,
    PrefillFailed: _PREFILL,
    HandoffBroke: _PREFILL,
    DecodeAnswered: _DECODE,
    DecodeFailed: _DECODE | {"overtaking", "streaming"},
}
