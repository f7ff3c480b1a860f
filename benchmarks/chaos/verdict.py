"""What one request of a chaos client came to: right, a clean error, or something that must not be. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.chaos.call import Heard
from benchmarks.chaos.plan import Wish
from benchmarks.chaos.questions import Answer

Kind = Literal["right", "error", "turned away", "broken with the router", "left", "wrong", "late", "unclean"]
VIOLATIONS: frozenset[Kind] = frozenset({"wrong", "late", "unclean"})
AGAIN = frozenset({429, 503})  # with Retry-After: nobody can serve now
ERRORS = frozenset({502, 504})


@dataclass(frozen=True)
class Verdict:
    """`detail` says why, for errors and violations."""

    kind: Kind
    detail: str = ""


def judge(wish: Wish, answer: Answer, heard: Heard, *, left: bool, router_died: bool, deadline_s: float) -> Verdict:
    """`left`: the client has closed the connection itself. `router_died`: the router was killed meanwhile."""
    said = heard.text if heard.status == 200 else ""
    if not answer.text.startswith(said):
        return Verdict("wrong", f"{said!r} is not how {answer.text!r} begins")
    if left:
        return Verdict("left")
    if heard.seconds > deadline_s:
        return Verdict("late", f"{heard.seconds:.1f} s: {heard.status} {heard.error or heard.broken}")
    if heard.refused or (heard.status in AGAIN and heard.error):
        return Verdict("turned away", str(heard.status or "refused"))
    if not heard.done and not heard.error:
        if router_died:
            return Verdict("broken with the router")
        return Verdict("unclean", f"status {heard.status}, then {heard.broken}")
    if heard.status != 200 or heard.error:
        return _error(heard)
    return _whole(wish, answer, heard)


def _error(heard: Heard) -> Verdict:
    if heard.events and heard.done:
        return Verdict("unclean", f"an error event and [DONE]: {heard.error}")
    if not heard.error or (heard.status != 200 and heard.status not in ERRORS):
        return Verdict("unclean", f"status {heard.status}: {heard.error or heard.body}")
    return Verdict("error", f"{heard.status if heard.status != 200 else 'event'}: {heard.error}")


def _whole(wish: Wish, answer: Answer, heard: Heard) -> Verdict:
    """An answer that looks complete must be so."""
    got: list[Any] = [heard.text, heard.finish_reason]
    expected: list[Any] = [answer.text, answer.finish_reason]
    if not wish.streamed or wish.usage_asked:
        got += [heard.usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        expected += [answer.prompt_tokens, answer.completion_tokens]
    if got != expected:
        return Verdict("wrong", f"{got} instead of {expected}")
    return Verdict("right")
