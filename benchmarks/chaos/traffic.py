"""Chaos's clients: threads that ask one wish after the other, check every answer, and can be made to leave.

A client that is turned away (nobody listens, 429, 503) comes again with the same wish, as Retry-After asks, until the
deadline. Owns what is under way; knows nothing of what breaks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.chaos.call import Call, Heard
from benchmarks.chaos.ledger import Ledger
from benchmarks.chaos.plan import Phase, Wish, wish
from benchmarks.chaos.questions import Known
from benchmarks.chaos.verdict import judge

CLIENTS = 6
COME_AGAIN_S = 1.0
# The router's own limit is 60 s, and 5 s for its goodbye; it may be stopped for 8 s in the middle of that.
ROUTER_LIMIT_S = 60
DEADLINE_S = 80.0
WAKE_S = 0.01


class Traffic:
    """`start` and `stop` once each. Everything else is safe from any thread."""

    def __init__(
        self,
        pool: Sequence[Known],
        ledger: Ledger,
        *,
        model: str,
        router_url: Callable[[], str],
        router_died_since: Callable[[float], bool],
    ) -> None:
        self._pool = pool
        self._ledger = ledger
        self._model = model
        self._router_url = router_url
        self._router_died_since = router_died_since
        self._moved = threading.Condition()
        self._sent = 0
        self._tokens = 0
        self._under_way: dict[int, Call] = {}  # by number of the wish
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, clients: int = CLIENTS) -> None:
        self._threads = [threading.Thread(target=self._client, name=f"client-{n}") for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> bool:
        """No new wishes. Whether all clients have ended, as they must."""
        self._ending.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE_S)
        return not any(thread.is_alive() for thread in self._threads)

    def marks(self) -> tuple[int, int]:
        """Requests sent and tokens streamed so far."""
        return self._sent, self._tokens

    def wait(self) -> None:
        """Until something was sent or streamed, or a moment has passed."""
        with self._moved:
            self._moved.wait(WAKE_S)

    def leave_one(self, phase: Phase) -> bool:
        """One client closes its connection; one that streams in phase decode, one that waits in the others."""
        with self._moved:
            calls = list(self._under_way.values())
        fitting = [call for call in calls if (call.tokens_seen > 0) == (phase == "decode") and not call.left]
        return bool(fitting) and fitting[-1].leave()

    # --- a client's thread --------------------------------------------------------------------------------------

    def _client(self) -> None:
        try:
            while not self._ending.is_set():
                self._serve(wish(self._ledger.next_wish(), seed=self._ledger.seed, pool=self._pool))
        except Exception as error:  # noqa: BLE001 - the top of a thread; a dead client must not go unseen
            self._ledger.find(f"a client ended by itself: {error!r}")

    def _serve(self, one: Wish) -> None:
        known = self._pool[one.question]
        ends_at = time.monotonic() + DEADLINE_S
        while True:
            asked_at = time.monotonic()
            call = Call(
                self._router_url() + known.question.path, body_of(one, known, self._model),
                deadline_s=DEADLINE_S, on_token=self._token,
            )  # fmt: skip
            heard = self._ask(one, call)
            verdict = judge(
                one, known.answer(one.max_tokens), heard,
                left=call.left, router_died=self._router_died_since(asked_at), deadline_s=DEADLINE_S,
            )  # fmt: skip
            if verdict.kind != "turned away" or time.monotonic() > ends_at:
                self._ledger.end(one, verdict, heard)
                return
            self._ledger.turned_away(verdict)
            if self._ending.wait(COME_AGAIN_S):
                return

    def _ask(self, one: Wish, call: Call) -> Heard:
        with self._moved:
            self._under_way[one.number] = call
            self._sent += 1
            self._moved.notify_all()
        try:
            return call.run()
        finally:
            with self._moved:
                del self._under_way[one.number]

    def _token(self) -> None:
        with self._moved:
            self._tokens += 1
            self._moved.notify_all()


def body_of(one: Wish, known: Known, model: str) -> dict[str, Any]:
    body = known.question.body(model, one.max_tokens)
    if one.streamed:
        body["stream"] = True
        if one.usage_asked:
            body["stream_options"] = {"include_usage": True}
    if one.unseedable:
        body["seed"] = one.number  # of no consequence to a greedy answer, but the journey must not split it
    return body
