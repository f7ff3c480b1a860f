"""The line before the engines: who waits, whose turn it is, who is turned away. Sans-IO: time is an argument.

A request waits when every engine that could take it is full. It waits in the line of its *need* (a model, and whether
a pair or one engine is asked for), so that who needs a pair holds up nobody who needs a decode engine. Within a line
lower priority numbers go first, and among equals tenants take turns, however many requests each has. The head of a
line is *called* when something may have become free; it looks at the engines and either goes or stays, and until it
has said so nobody of its line can overtake it.

All lines together hold `size` requests. Beyond that the last request of the worst priority's busiest tenant is turned
away: who fills the queue loses his own places, not those of others. One thread: the event loop's.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter as Tally
from typing import Literal

import msgspec

PRIORITIES = (-100, 100)  # as in vLLM, lower is earlier
QUEUE_BYTES_MAX = 512 << 20  # of waiting bodies: a hundred long chats with images
RATE_HALF_LIFE_S = 10.0
RETRY_AFTER_MAX_S = 60

TurnedAwayWhy = Literal["queue_full", "queue_timeout", "long_wait", "draining"]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """How a request waits, if it has to."""

    tenant: str = ""
    priority: int = 0
    ttl_s: float = math.inf  # the queue's own timeout may be shorter
    size_bytes: int = 0


class Call(msgspec.Struct, frozen=True):
    """It is this request's turn to look: answer with `went`, `stays` or `left`."""

    number: int


class TurnAway(msgspec.Struct, frozen=True):
    """This request waits no longer."""

    number: int
    why: TurnedAwayWhy


Word = Call | TurnAway


class _Waiting(msgspec.Struct):
    number: int
    need: str
    wish: Wish
    key: tuple[int, float, int]  # its place in the line: priority, turn of its tenant, arrival
    expires_at: float


class _Line:
    """Who waits for one need. `heap` may hold those who have left."""

    def __init__(self) -> None:
        self.heap: list[tuple[tuple[int, float, int], int]] = []
        self.members = 0
        self.called: int | None = None
        self.again = False  # something became free while the called one looked
        self.turn = 0.0  # of who went last
        self.turns: dict[str, float] = {}  # tenant -> of its last request


class Admission:
    """`queue_size` 0: nobody waits, who finds no room is turned away."""

    def __init__(self, *, queue_size: int, queue_timeout_s: float) -> None:
        self.draining = False
        self._size = queue_size
        self._timeout_s = queue_timeout_s
        self._waiting: dict[int, _Waiting] = {}
        self._lines: dict[str, _Line] = {}
        self._crowds: dict[tuple[int, str], dict[int, None]] = {}  # (priority, tenant) -> who waits, oldest first
        self._bytes = 0
        self._numbers = 0
        self._rate = Rate()

    def __repr__(self) -> str:
        return f"<Admission {len(self._waiting)} of {self._size} waiting in {len(self._lines)} lines>"

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def needs(self) -> frozenset[str]:
        """For what somebody waits: who comes now and needs the same must line up too."""
        return frozenset(self._lines)

    def arrive(self, need: str, wish: Wish, now: float) -> tuple[int, list[Word]]:
        """A request lines up. Returns its number, and who is turned away for it, itself perhaps."""
        self._numbers += 1
        number = self._numbers
        if self.draining:
            return number, [TurnAway(number, "draining")]
        if self._size == 0 or wish.size_bytes > QUEUE_BYTES_MAX:
            return number, [TurnAway(number, "queue_full")]
        self._enter(number, need, wish, now)
        words: list[Word] = []
        while len(self._waiting) > self._size or self._bytes > QUEUE_BYTES_MAX:
            loser = self._loser(_crowd(wish))
            words += [TurnAway(loser, "queue_full"), *self._remove(loser)]
        return number, words

    def stir(self) -> list[Word]:
        """Something may have become free: the head of each line is to look."""
        words: list[Word] = []
        for line in self._lines.values():
            if line.called is None:
                words += self._call_head(line)
            else:
                line.again = True
        return words

    def went(self, number: int, now: float) -> list[Word]:
        """The called request has found an engine."""
        self._rate.count(now)
        waiting = self._waiting.get(number)
        if waiting is not None:
            line = self._lines[waiting.need]
            line.turn = max(line.turn, waiting.key[1])
        return self._remove(number)

    def stays(self, number: int) -> list[Word]:
        """The called request has found no room, and is called again when something becomes free."""
        waiting = self._waiting.get(number)
        if waiting is None:
            return []
        line = self._lines[waiting.need]
        if line.called == number:
            line.called = None
        return self._call_head(line) if line.again else []

    def left(self, number: int) -> list[Word]:
        """This request is over, whatever became of it. Unknown ones have been turned away."""
        return self._remove(number)

    def expire(self, now: float) -> list[Word]:
        words: list[Word] = []
        for waiting in [w for w in self._waiting.values() if w.expires_at <= now]:
            words.append(TurnAway(waiting.number, "queue_timeout"))
            words += self._remove(waiting.number)
        return words

    def drain(self) -> list[Word]:
        """Nobody is admitted from now on, and who waits is sent elsewhere."""
        self.draining = True
        words: list[Word] = [TurnAway(number, "draining") for number in self._waiting]
        self._waiting.clear()
        self._lines.clear()
        self._crowds.clear()
        self._bytes = 0
        return words

    def resume(self) -> None:
        self.draining = False

    def retry_after_s(self, now: float) -> int:
        """When a place should be free: what waits, at the pace at which it has gone on lately. Whole seconds, ≥ 1."""
        pace = self._rate.per_s(now)
        return min(RETRY_AFTER_MAX_S, max(1, math.ceil(len(self._waiting) / pace))) if pace > 0 else 1

    def check_integrity(self) -> None:
        """Raises AssertionError if the books do not agree."""
        crowds = Tally(_crowd(w.wish) for w in self._waiting.values())
        assert {crowd: len(members) for crowd, members in self._crowds.items()} == crowds
        assert self._bytes == sum(w.wish.size_bytes for w in self._waiting.values())
        assert set(self._lines) == {w.need for w in self._waiting.values()}
        for need, line in self._lines.items():
            assert line.members == sum(w.need == need for w in self._waiting.values())
            assert line.called is None or line.called in self._waiting

    def _enter(self, number: int, need: str, wish: Wish, now: float) -> None:
        line = self._lines.setdefault(need, _Line())
        turn = max(line.turn, line.turns.get(wish.tenant, 0.0)) + 1
        line.turns[wish.tenant] = turn
        key = (wish.priority, turn, number)
        expires_at = now + min(wish.ttl_s, self._timeout_s)
        self._waiting[number] = _Waiting(number, need, wish, key, expires_at)
        self._crowds.setdefault(_crowd(wish), {})[number] = None
        self._bytes += wish.size_bytes
        heapq.heappush(line.heap, (key, number))
        line.members += 1
        self._prune(line)

    def _loser(self, newest: tuple[int, str]) -> int:
        """The last one of the crowd that has most of what there is too much of: places, or else bytes."""

        def weight(crowd: tuple[int, str]) -> tuple[int, int, bool]:
            members = self._crowds[crowd]
            if len(self._waiting) > self._size:
                return crowd[0], len(members), crowd == newest
            return sum(self._waiting[number].wish.size_bytes for number in members), crowd[0], crowd == newest

        return next(reversed(self._crowds[max(self._crowds, key=weight)]))

    def _prune(self, line: _Line) -> None:
        """Forgets who has left: a line may live long and see many."""
        if len(line.heap) > 2 * self._size + 2:
            line.heap = [entry for entry in line.heap if entry[1] in self._waiting]
            heapq.heapify(line.heap)
        if len(line.turns) > 2 * self._size + 2:
            here = {waiting.wish.tenant for waiting in self._waiting.values()}
            line.turns = {tenant: turn for tenant, turn in line.turns.items() if tenant in here}

    def _call_head(self, line: _Line) -> list[Word]:
        while line.heap and line.heap[0][1] not in self._waiting:
            heapq.heappop(line.heap)
        line.again = False
        line.called = line.heap[0][1] if line.heap else None
        return [] if line.called is None else [Call(line.called)]

    def _remove(self, number: int) -> list[Word]:
        """Returns the call of the next one if this one was the head that everybody waited for."""
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return []
        self._bytes -= waiting.wish.size_bytes
        crowd = _crowd(waiting.wish)
        del self._crowds[crowd][number]
        if not self._crowds[crowd]:
            del self._crowds[crowd]
        line = self._lines[waiting.need]
        line.members -= 1
        if not line.members:
            del self._lines[waiting.need]
            return []
        return self._call_head(line) if line.called == number else []


class Rate:
    """Events a second, of which those of RATE_HALF_LIFE_S ago count half. Zero until there was one."""

    def __init__(self) -> None:
        self._count = 0.0
        self._at = 0.0

    def count(self, now: float) -> None:
        self._count = self._left(now) + 1.0
        self._at = now

    def per_s(self, now: float) -> float:
        return self._left(now) * math.log(2) / RATE_HALF_LIFE_S

    def _left(self, now: float) -> float:
        return self._count * 0.5 ** (max(0.0, now - self._at) / RATE_HALF_LIFE_S)


def _crowd(wish: Wish) -> tuple[int, str]:
    return wish.priority, wish.tenant
