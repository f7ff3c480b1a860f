"""Plays the admission machine: whose turn it is becomes a future's result. Owned by the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from pdx.router.line.admission import Admission, Call, TurnAway, TurnedAwayWhy, Wish, Word

__all__ = ["Gate", "Place"]


class Place:
    """One request's place in a line."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.since = time.monotonic()
        self._word: asyncio.Future[TurnedAwayWhy | None] = asyncio.get_running_loop().create_future()

    async def turn(self) -> TurnedAwayWhy | None:
        """Waits until it is this request's turn to look (None), or why it is turned away. Once per word."""
        await self._word
        why = self._word.result()  # of the newest: it may have been turned away since it was called
        self._word = asyncio.get_running_loop().create_future()
        return why

    def tell(self, why: TurnedAwayWhy | None) -> None:
        if self._word.done():  # called, and turned away before it could look
            self._word = asyncio.get_running_loop().create_future()
        self._word.set_result(why)


class Gate:
    """Where requests wait for an engine."""

    def __init__(self, *, queue_size: int, queue_timeout_s: float) -> None:
        self.queue = Admission(queue_size=queue_size, queue_timeout_s=queue_timeout_s)
        self._places: dict[int, Place] = {}

    def line_up(self, need: str, wish: Wish, place: Place | None) -> Place:
        """A place in the line of `need`; with `place`, that one, whose turn was in vain."""
        if place is not None:
            self._say(self.queue.stays(place.number))
            return place
        number, words = self.queue.arrive(need, wish, time.monotonic())
        new = self._places[number] = Place(number)
        self._say(words)
        return new

    def done(self, place: Place, *, went: bool) -> None:
        """This request waits no longer. `went`: an engine has it."""
        del self._places[place.number]
        self._say(self.queue.went(place.number, time.monotonic()) if went else self.queue.left(place.number))

    def stir(self) -> None:
        """Something may have become free."""
        self._say(self.queue.stir())

    def tick(self) -> None:
        """Every 0.1 s or so."""
        self._say(self.queue.expire(time.monotonic()))
        self.stir()

    def drain(self) -> None:
        self._say(self.queue.drain())

    def retry_after_s(self) -> int:
        return self.queue.retry_after_s(time.monotonic())

    def _say(self, words: Iterable[Word]) -> None:
        for word in words:
            place = self._places.get(word.number)
            if place is not None:
                match word:
                    case Call():
                        place.tell(None)
                    case TurnAway():
                        place.tell(word.why)
