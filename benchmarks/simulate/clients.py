"""Simulated clients: ask, wait, sometimes leave, and check that the answer is the one to their own question."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from benchmarks.simulate.host import KEY
from benchmarks.simulate.prompts import MODEL, Talk, answer_of, text_of
from benchmarks.simulate.router import Conductor, SimulatedRouter, request_of
from benchmarks.simulate.world import Violation, World
from pdx.router.request.settings import Settings
from pdx.wire import Budgets

BUDGETS = Budgets(grant_s=3.0, slab_s=3.0, total_s=12.0, claim_s=1.0)
TIGHT = Budgets(grant_s=0.05, slab_s=0.03, total_s=0.08, claim_s=0.02)  # of a storm: most handoffs miss them
PREFILL_TIMEOUT_S = 8.0
IN_FLIGHT_MAX = 4  # at one engine: some requests have to wait in the router
DEADLINE_S = 25.0
GRACE_S = 0.1  # the router acts on a deadline in no time, unless it is stopped
LEAVE_CHANCE = 0.04
THINK_S = 0.02
AGAIN_S = 0.2  # while there is no router, or no pair


class Clients:
    """A number of people who ask again when they have their answer, until `requests` were asked."""

    def __init__(self, world: World, router: SimulatedRouter, *, people: int, handoffs: int) -> None:
        self.world = world
        self.router = router
        self.handoffs = 0
        self.busy = 0
        self.storm_until = 0.0
        self._wanted = handoffs
        self._talk = Talk(world.chance)
        for _ in range(people):
            self.busy += 1
            world.later(world.chance.random() * 0.1, self._ask)

    def _ask(self) -> None:
        if self.handoffs >= self._wanted:
            self.busy -= 1
            return
        if not self.router.alive:
            self.world.later(AGAIN_S, self._ask)
            return
        Client(self)

    def finished(self, client: Client, outcome: str) -> None:
        self.world.counts[f"requests {outcome}"] += 1
        if outcome == "answered":
            self._talk.answered(client.tokens, answer_of(client.tokens, client.wanted))
        journey = client.conductor.journey if client.conductor is not None else None  # None: turned away at once
        if journey is not None and journey.handoff_id:
            self.handoffs += 1
            self.world.counts[f"handoffs of requests {outcome}, {journey.way}"] += 1
            pause_s = THINK_S
        else:
            pause_s = AGAIN_S  # no pair just now
        self.world.later(self.world.chance.random() * pause_s, self._ask)


class Client:
    """One request."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._world = world = clients.world
        self._said = b""
        self._done = False
        chance = world.chance
        self.tokens = clients._talk.next_prompt()
        self.wanted = chance.choice([1, 2, 3, 5, 9])
        self.stream = chance.random() < 0.5
        extra: dict[str, Any] = {"presence_penalty": 0.5} if chance.random() < 0.35 else {}  # can't be seeded
        way: Literal["auto", "after"] = "after" if chance.random() < 0.2 else "auto"
        budgets = TIGHT if world.now < clients.storm_until else BUDGETS
        settings = Settings(
            cluster_key=KEY,
            budgets=budgets,
            prefill_timeout_s=PREFILL_TIMEOUT_S,
            journey=way,
            max_in_flight_prefill=IN_FLIGHT_MAX,
            max_in_flight_decode=IN_FLIGHT_MAX,
        )
        request = request_of(self.tokens, model=MODEL, wanted=self.wanted, stream=self.stream, extra=extra)
        self.conductor: Conductor | None = None
        self.conductor = clients.router.serve(request, settings, DEADLINE_S, self)
        if not self._done:
            world.later(DEADLINE_S + GRACE_S, self._must_be_done)
            if chance.random() < LEAVE_CHANCE:
                world.later(chance.random() * 0.3, self._leave)

    # --- what the router says ---------------------------------------------------------------------------------

    def write(self, body: bytes) -> None:
        self._said += body

    def closed(self) -> None:
        """The end of a stream: whole, or with an error event and no [DONE]."""
        text, broken, done = "", False, False
        for line in self._said.split(b"\n"):
            if line == b"data: [DONE]":
                done = True
            elif line.startswith(b"data: "):
                chunk = msgspec.json.decode(line[6:])
                broken |= "error" in chunk
                text += "".join(choice["text"] for choice in chunk.get("choices", ()))
        if broken == done:
            raise Violation("wrong", f"a stream that is {'broken, and says [DONE]' if done else 'cut without a word'}")
        right = text_of(answer_of(self.tokens, self.wanted))
        if text != right and not (broken and right.startswith(text)):
            raise Violation("wrong", f"a stream says {text!r} instead of {right!r}")
        self._finish("broken off" if broken else "answered")

    def answered(self, status: int, body: bytes) -> None:
        if status != 200:
            self._finish(f"refused with {status}")
            return
        text = msgspec.json.decode(body)["choices"][0]["text"]
        right = text_of(answer_of(self.tokens, self.wanted))
        if text != right:
            raise Violation("wrong", f"an answer says {text!r} instead of {right!r}")
        self._finish("answered")

    def broke(self) -> None:
        """The router has died."""
        self._finish("lost with the router")

    # --- what the client does ---------------------------------------------------------------------------------

    def _leave(self) -> None:
        if not self._done and self.conductor is not None:
            self.conductor.client_gone()
            self._finish("given up by the client")

    def _must_be_done(self) -> None:
        if not self._done:
            asleep_s = self._clients.router.asleep_until - self._world.now
            if asleep_s > 0:
                self._world.later(asleep_s + GRACE_S, self._must_be_done)
                return
            journey = self.conductor.journey if self.conductor is not None else "it"
            raise Violation("late", f"{journey} is not answered after {DEADLINE_S:g} s")

    def _finish(self, outcome: str) -> None:
        if not self._done:
            self._done = True
            self._clients.finished(self, outcome)
