"""What chaos asks, and what is right: questions whose greedy answer one plain engine gives with a wide margin.

Greedy decoding in bfloat16 may fork where two tokens are nearly as likely, for instance when the batch differs. Each
question may therefore only be asked for as many tokens as the plain engine was sure of, by MARGIN_NATS at every one:
within these any difference is an error. Most questions hold a list and begin to repeat it, so that their answers are
found nowhere but in the prompt's own KV. Knows nothing of faults or fleets.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.chaos.call import Call

MARGIN_NATS = 0.5  # differences of batch and chunking move bfloat16's log-probabilities by some hundredths
TOKENS_MIN, TOKENS_MAX = 4, 24
ASKED_AT_ONCE = 8  # fewer than an engine's --max-num-seqs
ANSWER_S = 120.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

_NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Frank", "Greta", "Henry", "Irene", "Jonas", "Kate", "Lukas")
_THINGS = ("apples", "boats", "candles", "drums", "eggs", "forks", "goats", "hats", "keys", "lamps", "maps", "nails")
_SHORT = (
    "1, 2, 3, 4, 5,", "a b c d e f g", "Monday, Tuesday, Wednesday,", "January, February, March,", "10, 20, 30, 40,",
    "one two three four five", "The capital of France is", "2, 4, 6, 8, 10,", "red red red red red", "9, 8, 7, 6,",
    "to be or not to be, that is", "A", "The", "Hello",
)  # fmt: skip


class Question(msgspec.Struct, frozen=True):
    """One prompt. Many share the beginning of a list with others."""

    path: str
    text: str

    def body(self, model: str, max_tokens: int) -> dict[str, Any]:
        greedy = {"model": model, "max_tokens": max_tokens, "temperature": 0}
        if self.path == CHAT:
            return {**greedy, "messages": [{"role": "user", "content": self.text}]}
        return {**greedy, "prompt": self.text}


class Answer(msgspec.Struct, frozen=True):
    """What a question is to be answered with, when it is asked for so many tokens."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Known(msgspec.Struct, frozen=True):
    """A question with the answer of a plain engine, as far as that was sure."""

    question: Question
    pieces: list[str]  # the text of each token
    ends: bool  # after these tokens the engine stops by itself
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.pieces)

    def answer(self, max_tokens: int) -> Answer:
        """`max_tokens` is at most `tokens`."""
        ended = self.ends and max_tokens == self.tokens
        text = "".join(self.pieces[:max_tokens])
        return Answer(text, "stop" if ended else "length", self.prompt_tokens, max_tokens)


def candidates(count: int, *, seed: int) -> list[Question]:
    """Questions from one to some 700 tokens, mostly short; nobody knows yet how sure their answers are."""
    generator = random.Random(seed)
    lists = [_list(generator) for _ in range(8)]
    questions = [Question(COMPLETIONS, text) for text in _SHORT]
    while len(questions) < count:
        lines = generator.choice(lists)
        any_length, short = generator.randrange(2, len(lines)), 2 + int(generator.expovariate(1 / 5))
        length = any_length if generator.random() < 0.3 else min(short, len(lines))
        if generator.random() < 0.3:
            text = "Repeat this list, and write nothing else.\n" + "\n".join(lines[:length])
            questions.append(Question(CHAT, text))
        else:
            again = generator.randrange(1, length)
            words = lines[again].split()
            begun = " ".join(words[: generator.randrange(1, len(words))])
            parts = ["The list:", *lines[:length], "", "The same list again:", *lines[:again], begun]
            questions.append(Question(COMPLETIONS, "\n".join(parts)))
    return list(dict.fromkeys(questions))[:count]


def learn(questions: Sequence[Question], *, url: str, model: str) -> list[Known]:
    """Asks the plain engine at `url`; keeps the questions that it is sure about. Raises ValueError."""

    def ask(question: Question) -> Known | None:
        asked = {"logprobs": True, "top_logprobs": 2} if question.path == CHAT else {"logprobs": 2}
        heard = Call(url + question.path, question.body(model, TOKENS_MAX) | asked, deadline_s=ANSWER_S).run()
        if heard.status != 200 or heard.body is None:
            raise ValueError(f"the plain engine answers {heard.status}: {heard.error or heard.broken}")
        return known(question, heard.body)

    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return [answer for answer in pool.map(ask, questions) if answer is not None]


def known(question: Question, body: dict[str, Any]) -> Known | None:
    """What an engine's answer with log-probabilities teaches; None if it is not sure of TOKENS_MIN tokens."""
    choice = body["choices"][0]
    pieces, margins = _chat_tokens(choice) if question.path == CHAT else _completion_tokens(choice)
    sure = next((index for index, margin in enumerate(margins) if margin < MARGIN_NATS), len(margins))
    ends = choice["finish_reason"] == "stop" and sure == len(margins)
    if ends:
        pieces[-1] = ""  # the end-of-text token is counted, not shown
    pieces = pieces[:sure]
    whole = choice.get("text", (choice.get("message") or {}).get("content"))
    if (sure < TOKENS_MIN and not ends) or "\ufffd" in "".join(pieces) or not whole.startswith("".join(pieces)):
        return None
    return Known(question, pieces, ends, body["usage"]["prompt_tokens"])


def learned(
    path: Path, questions: Sequence[Question], *, model: Path, learn_now: Callable[[], list[Known]]
) -> list[Known]:
    """From the file at `path` if it knows these very questions of this model; else learns and writes it."""
    described = json.dumps([msgspec.to_builtins(questions), model.name, MARGIN_NATS, TOKENS_MAX])
    name = hashlib.sha256(described.encode()).hexdigest()[:16]
    file = path / f"{model.name}-{name}.json"
    if not file.exists():
        answers = learn_now()
        path.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_bytes(msgspec.json.encode(answers))
        unfinished.replace(file)
    return msgspec.json.decode(file.read_bytes(), type=list[Known])


def _completion_tokens(choice: dict[str, Any]) -> tuple[list[str], list[float]]:
    logprobs = choice["logprobs"]
    return list(logprobs["tokens"]), [_margin(top.values()) for top in logprobs["top_logprobs"]]


def _chat_tokens(choice: dict[str, Any]) -> tuple[list[str], list[float]]:
    content = choice["logprobs"]["content"]
    margins = [_margin([top["logprob"] for top in entry["top_logprobs"]]) for entry in content]
    return [entry["token"] for entry in content], margins


def _margin(logprobs: Any) -> float:
    best = sorted(logprobs, reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")


def _list(generator: random.Random) -> list[str]:
    lines = [
        f"{number}. {generator.choice(_NAMES)} has {generator.randrange(2, 90)} {generator.choice(_THINGS)}."
        for number in range(1, 31)
    ]
    return lines
