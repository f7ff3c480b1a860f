"""Answers with their log-probs, token for token, and where two of them part. Knows nothing of who gave them."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from benchmarks.harness.arms import Arm
from benchmarks.harness.measure import completion
from pdx.errors import PdxError

TOKENS = 12
RIVALS = 5  # log-probs of the best so many tokens at each place
NEAR_TIE_NATS = 0.5  # logits of 16 to 32 have steps of 0.125 in bf16: two steps for each of two tokens
DEADLINE_S = 180.0

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    tokens: list[str]
    rivals: list[dict[str, float]]  # at each place: token -> log-prob
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parting:
    """The first token in which two answers differ. Up to there both engines had the same text before them."""

    index: int
    left: str
    right: str
    nats: float  # how far the two tokens are apart, by the left engine's log-probs
    nats_right: float


def answer_of(arm: Arm, prompt: list[int]) -> Answer:
    """Greedy, whole, with the names of tokens by id. Raises PdxError if it is not 200."""
    body = completion(arm.model, prompt, TOKENS, logprobs=RIVALS, return_tokens_as_token_ids=True)
    target = urlsplit(arm.url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=DEADLINE_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        raw = response.read()
        if response.status != 200:
            raise PdxError(f"{arm.name} answered {response.status}: {raw[:300]!r}")
        logprobs: dict[str, Any] = json.loads(raw)["choices"][0]["logprobs"]
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(logprobs["tokens"], logprobs["top_logprobs"], headers)
    finally:
        connection.close()


def compare(left: Answer, right: Answer) -> Parting | None:
    """None if all tokens are equal. Infinitely far apart is a token that is not even among the other's rivals."""
    for index, (ours, theirs) in enumerate(zip(left.tokens, right.tokens, strict=True)):
        if ours != theirs:
            apart = [_apart(answer.rivals[index], ours, theirs) for answer in (left, right)]
            return Parting(index, ours, theirs, apart[0], apart[1])
    return None


def near(left: Answer, right: Answer) -> bool:
    """Equal, or parted at a near tie: a recomputed prompt is another computation."""
    parting = compare(left, right)
    return parting is None or parting.nats <= NEAR_TIE_NATS


def _apart(rivals: dict[str, float], one: str, other: str) -> float:
    return abs(rivals.get(one, math.inf) - rivals.get(other, -math.inf))


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Their results; the first error is raised once all have ended."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
