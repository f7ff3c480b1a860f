"""What an answer comes to: only a whole and right one is right, and only a clean error is an error."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.chaos.call import Heard
from benchmarks.chaos.plan import Wish
from benchmarks.chaos.questions import CHAT, COMPLETIONS, Known, Question, known
from benchmarks.chaos.verdict import Verdict, judge

QUESTION = Known(Question(COMPLETIONS, "count"), [" one", " two", " three"], False, 5)
STREAMED = Wish(1, 0, 2, streamed=True, unseedable=False, usage_asked=False)
WHOLE = Wish(2, 0, 2, streamed=False, unseedable=False, usage_asked=True)
USAGE = {"prompt_tokens": 5, "completion_tokens": 2}
ERROR = {"error": {"message": "no engine could answer", "code": 502}}


def event(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish_reason}]}


def verdict(
    heard: Heard, *, wish: Wish = STREAMED, left: bool = False, router_died: bool = False, deadline_s: float = 10.0
) -> str:
    answer = QUESTION.answer(wish.max_tokens)
    return judge(wish, answer, heard, left=left, router_died=router_died, deadline_s=deadline_s).kind


RIGHT = Heard(status=200, events=[event(" one"), event(" two", "length")], done=True)


def test_right() -> None:
    assert verdict(RIGHT) == "right"
    body = {"choices": [{"text": " one two", "finish_reason": "length"}], "usage": USAGE}
    assert verdict(Heard(status=200, body=body, done=True), wish=WHOLE) == "right"


@pytest.mark.parametrize(
    "events",
    [
        [event(" one"), event(" three", "length")],
        [event(" one", "length")],
        [event(" one"), event(" two", "stop")],
        [event(" one"), event(" two"), event(" three", "length")],
        [],
    ],
    ids=["other token", "cut short", "other reason", "too long", "nothing"],
)
def test_what_looks_complete_must_be_right(events: list[dict[str, Any]]) -> None:
    assert verdict(Heard(status=200, events=events, done=True)) == "wrong"


def test_usage_is_part_of_the_answer() -> None:
    body = {"choices": [{"text": " one two", "finish_reason": "length"}], "usage": {**USAGE, "completion_tokens": 3}}
    assert verdict(Heard(status=200, body=body, done=True), wish=WHOLE) == "wrong"


def test_clean_errors() -> None:
    assert verdict(Heard(status=502, body=ERROR, done=True)) == "error"
    assert verdict(Heard(status=200, events=[event(" one"), ERROR])) == "error"


def test_unclean_ones() -> None:
    assert verdict(Heard(status=502, body={}, done=True)) == "unclean"
    assert verdict(Heard(status=400, body=ERROR, done=True)) == "unclean"
    assert verdict(Heard(status=500, body=ERROR, done=True)) == "unclean"
    assert verdict(Heard(status=200, events=[event(" one"), ERROR], done=True)) == "unclean"
    assert verdict(Heard(status=200, events=[event(" one")], broken="EOF")) == "unclean"
    assert verdict(Heard(broken="reset")) == "unclean"


def test_a_killed_router_breaks_connections_but_excuses_no_wrong_token() -> None:
    assert verdict(Heard(status=200, events=[event(" one")], broken="EOF"), router_died=True).startswith("broken")
    assert verdict(Heard(broken="reset"), router_died=True).startswith("broken")
    assert verdict(Heard(status=200, events=[event(" two")], broken="EOF"), router_died=True) == "wrong"


def test_wrong_tokens_before_an_error_or_a_leave_are_wrong() -> None:
    assert verdict(Heard(status=200, events=[event(" two"), ERROR])) == "wrong"
    assert verdict(Heard(status=200, events=[event(" two")]), left=True) == "wrong"
    assert verdict(Heard(status=200, events=[event(" one")]), left=True) == "left"


def test_turned_away_and_late() -> None:
    assert verdict(Heard(refused=True)) == "turned away"
    assert verdict(Heard(status=429, body=ERROR, done=True)) == "turned away"
    assert verdict(Heard(status=503, body={}, done=True)) == "unclean"
    assert verdict(Heard(status=200, broken="timed out", seconds=10.1)) == "late"
    assert judge(
        STREAMED, QUESTION.answer(2), Heard(broken="timed out", seconds=10.1),
        left=False, router_died=False, deadline_s=10.0,
    ) == Verdict("late", "10.1 s: 0 timed out")  # fmt: skip


def completion(tokens: list[str], margins: list[float], finish_reason: str) -> dict[str, Any]:
    top = [{"a": -0.1, "b": -0.1 - margin} for margin in margins]
    text = "".join(token for token in tokens if not token.startswith("<"))
    logprobs = {"tokens": tokens, "top_logprobs": top}
    return {"choices": [{"text": text, "finish_reason": finish_reason, "logprobs": logprobs}],
            "usage": {"prompt_tokens": 3}}  # fmt: skip


def test_a_question_is_known_as_far_as_the_engine_was_sure() -> None:
    question = Question(COMPLETIONS, "?")
    found = known(question, completion(list("abcdef"), [9, 9, 9, 9, 9, 0.1], "length"))
    assert found is not None
    assert (found.pieces, found.ends) == (list("abcde"), False)
    assert known(question, completion(list("abcdef"), [9, 9, 9, 0.1, 9, 9], "length")) is None


def test_an_answer_that_ends_by_itself_is_known_with_its_end() -> None:
    found = known(Question(COMPLETIONS, "?"), completion(["a", "b", "<end>"], [9, 9, 9], "stop"))
    assert found is not None
    assert (found.answer(3).text, found.answer(3).finish_reason, found.answer(2).finish_reason) == (
        "ab",
        "stop",
        "length",
    )


def test_chat_is_known_too() -> None:
    content = [{"token": t, "top_logprobs": [{"logprob": -0.1}, {"logprob": -5.0}]} for t in "abcde"]
    choice = {"message": {"content": "abcde"}, "finish_reason": "length", "logprobs": {"content": content}}
    found = known(Question(CHAT, "?"), {"choices": [choice], "usage": {"prompt_tokens": 3}})
    assert found is not None
    assert found.tokens == 5
