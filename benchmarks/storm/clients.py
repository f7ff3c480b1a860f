"""The clients of a storm: what they ask, and whether what they get is right, a clean refusal, or something else."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.harness.rig import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "router"))

from model_engine import generate, tokens_of

from benchmarks.storm.fleet import Router

PATH = "/v1/completions"
CLEAN = frozenset({429, 502, 503, 504})  # an answer that says that there is none
LEAVES = 0.05
PATIENCE_S = 0.06
PAUSE_S = 0.05  # of who was turned away: a tenth of what Retry-After asks


@dataclass
class Tally:
    """What became of all requests."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.counts.values())


class Clients:
    """`people` who ask one request after the other, of any router, until `requests` were asked."""

    def __init__(self, routers: list[Router], chance: random.Random, *, requests: int, deadline_s: float) -> None:
        self.tally = Tally()
        self._routers = routers
        self._chance = chance
        self._left = requests
        self._deadline_s = deadline_s

    async def run(self, client: aiohttp.ClientSession, people: int) -> Tally:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(people):
                tasks.create_task(self._person(client))
        return self.tally

    async def _person(self, client: aiohttp.ClientSession) -> None:
        while self._left > 0:
            self._left -= 1
            first = self._chance.choice(self._routers)
            body = self._body()
            leaves_s = self._chance.random() * PATIENCE_S if self._chance.random() < LEAVES else None
            begun = time.monotonic()
            try:
                async with asyncio.timeout(self._deadline_s if leaves_s is None else leaves_s):
                    verdict = await self._ask(client, first, body)
            except TimeoutError:
                verdict = "left" if leaves_s is not None else "UNANSWERED"
            self.tally.seconds.append(time.monotonic() - begun)
            if verdict.split()[0].isupper():
                self.tally.violations.append(f"{verdict}: {json.dumps(body)}")
                verdict = verdict.split()[0]
            self.tally.counts[verdict] += 1
            if verdict not in ("right", "left"):
                await asyncio.sleep(self._chance.random() * PAUSE_S)

    async def _ask(self, client: aiohttp.ClientSession, first: Router, body: dict[str, Any]) -> str:
        """The verdict of the first router that listens."""
        for router in sorted(self._routers, key=lambda router: router is not first):
            lives, ready = router.lives, router.ready
            try:
                return await _asked(client, router.url, body)
            except aiohttp.ClientConnectorError:
                continue
            except aiohttp.ClientError as error:
                died = not ready or lives != router.lives or not router.ready
                return "lost with the router" if died else f"UNCLEAN {error!r}"
        return "no router"

    def _body(self) -> dict[str, Any]:
        chance = self._chance
        body: dict[str, Any] = {
            "model": "smol",
            "prompt": [chance.randrange(6, 16) for _ in range(chance.randrange(2, 24))],
            "max_tokens": chance.choice([1, 2, 5, 12]),
            "stream": chance.random() < 0.6,
            "ignore_eos": True,
        }
        if chance.random() < 0.3:
            body["presence_penalty"] = 0.5  # the fakes have none, but it can't be seeded
        if chance.random() < 0.1:
            body["n"] = 1
            body["priority"] = chance.randrange(-3, 4)
        return body


def right_text(body: dict[str, Any]) -> str:
    prompt = body["prompt"] if isinstance(body["prompt"], list) else tokens_of(body["prompt"])
    return generate(prompt, body, body["max_tokens"])[1]


async def _asked(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> str:
    """A verdict; in capitals it is a violation. Raises aiohttp.ClientError."""
    async with client.post(url + PATH, json=body) as reply:
        raw = await reply.read()
    if reply.status in CLEAN:
        message = json.loads(raw)["error"]
        late = reply.status in (429, 503) and int(reply.headers.get("Retry-After", "0")) < 1
        return f"WRONG {reply.status} without Retry-After" if late or not message["message"] else str(reply.status)
    if reply.status != 200:
        return f"WRONG status {reply.status}: {raw[:200]!r}"
    if not body["stream"]:
        text = json.loads(raw)["choices"][0]["text"]
        return "right" if text == right_text(body) else f"WRONG {text!r}"
    return _streamed(raw, right_text(body))


def _streamed(raw: bytes, right: str) -> str:
    text, error, done = "", False, False
    for line in raw.split(b"\n"):
        if line == b"data: [DONE]":
            done = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            error |= "error" in event
            text += "".join(choice.get("text") or "" for choice in event.get("choices", ()))
    if done == error:
        return f"WRONG end of a stream: {raw[-200:]!r}"
    if error:
        return "broken off" if right.startswith(text) else f"WRONG {text!r}, then an error"
    return "right" if text == right else f"WRONG {text!r}"
