"""Ways to choose one of several engines of one side. Pure: chance comes in numbers that were drawn before.

`Choice.turn` counts requests, `draws` are uniform in [0, 1), `session` names who should come back to the same engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import xxhash

if TYPE_CHECKING:
    from pdx.router.choice.policy import Candidate

# A session's engine may have a quarter more than its share before others get its requests: Mirrokni et al. prove that
# then at most 1/c² of a session's neighbours move when one engine joins or leaves.
LOAD_OVER_MEAN_MAX = 1.25


class Choice(NamedTuple):
    turn: int
    draws: tuple[float, float] = (0.0, 0.0)
    session: str = ""


def round_robin(candidates: Sequence[Candidate], choice: Choice) -> Candidate:
    return candidates[choice.turn % len(candidates)]


def least_loaded(candidates: Sequence[Candidate], choice: Choice) -> Candidate:
    """The smallest load; among equals, in turns."""
    least = min(candidate.load for candidate in candidates)
    return round_robin([candidate for candidate in candidates if candidate.load == least], choice)


def power_of_two(candidates: Sequence[Candidate], choice: Choice) -> Candidate:
    """The less loaded of two that were drawn: routers that know nothing of each other do not all choose the same."""
    first = int(choice.draws[0] * len(candidates))
    second = int(choice.draws[1] * (len(candidates) - 1))
    second += second >= first  # another one, each as likely
    pair = (candidates[first], candidates[second]) if len(candidates) > 1 else (candidates[first],) * 2
    return min(pair, key=lambda candidate: candidate.load)


def affinity(candidates: Sequence[Candidate], choice: Choice) -> Candidate:
    """The session's engine by rendezvous hashing, or its next one as long as that has too much to do.

    Without a session: least loaded.
    """
    if not choice.session:
        return least_loaded(candidates, choice)
    load_max = math.ceil(LOAD_OVER_MEAN_MAX * (sum(c.load for c in candidates) + 1) / len(candidates))
    ranked = sorted(candidates, key=lambda candidate: _weight(choice.session, candidate.engine_id), reverse=True)
    return next(candidate for candidate in ranked if candidate.load < load_max)


def _weight(session: str, engine_id: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{engine_id}\0{session}".encode(errors="surrogateescape"))  # a header's
