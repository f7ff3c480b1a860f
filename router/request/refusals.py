"""What the client gets when no engine has served its request."""

from __future__ import annotations

from pdx.router.front.replies import error_body, words_of
from pdx.router.request.actions import DOUBTFUL_STATUSES, NEVER_STATUSES, Answer, DecodeAnswered


def may_be_engines(status: int) -> bool:
    """Whether another engine may answer better: this one has failed or redirects, or it may be its own fault."""
    failed = status >= 500 and status not in NEVER_STATUSES
    return failed or 300 <= status < 400 or status in DOUBTFUL_STATUSES


def last_word(event: DecodeAnswered, *, opened: bool) -> Answer:
    """For an engine's answer of 300 and above that stays the last one. `opened`: the client has bytes already."""
    if event.status < 400:
        return no_answer(f"the engine's address redirects ({event.status}): name the engine by its final one")
    if event.status >= 500 and event.status not in NEVER_STATUSES:
        return no_answer(f"no engine could answer: decode_{event.status}")
    if opened:
        return no_answer("the engine refused to go on: " + words_of(event.body))
    return Answer(status=event.status, body=event.body, retry_after_s=event.retry_after_s)


def no_answer(message: str) -> Answer:
    return Answer(status=502, body=error_body(502, message))
