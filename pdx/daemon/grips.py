"""Engines' rights to slots: from SEND_OPENED or LOAD_OPENED until the engine lets go and its fence has passed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Literal

import msgspec

from pdx.buffer.claim import Claim
from pdx.buffer.lease import Lease, LeaseState
from pdx.daemon.ports import Desk, HandoffKey
from pdx.layout import Place
from pdx.wire import LetGo


@dataclass(eq=False)
class Grip:
    """One engine's lease in one handoff. `key` is None where there is none: loads from the cache, blocks to keep."""

    handoff_id: bytes
    side: Literal["send", "load"]
    engine_id: str
    lease: Lease
    key: HandoffKey | None = None
    places: Sequence[Place] = ()  # of a load: as the engine was told
    claim: Claim | None = None  # of blocks to keep
    request_id: str = ""  # of the engine, if what it keeps behind these blocks is to be known as their chain
    ranks: int = 1  # of the engine: so many workers touch the slots
    yields: bool = False  # a look-up's: its engine asks again
    from_arena: bool = False  # a load of what was there when it was asked for: its time is the engine's own
    words: dict[int, LetGo] = field(default_factory=dict)  # by rank: of those that have said that they do no more
    asked_at: float | None = None  # once its right is gone: when the engine was last asked to let go


_Awaited = tuple[int, int, Grip]  # fence, and a number of its own: by these they are sorted


class Grips:
    """All of them. Owned by the control thread."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._grips: dict[tuple[bytes, str], Grip] = {}
        self._by_lease: dict[Lease, Grip] = {}
        self._letting_go: dict[Grip, LetGo] = {}
        self._awaited: dict[str, list[_Awaited]] = {}  # by engine, of these: the one that passes first comes first
        self._numbers = count()

    def add(self, grip: Grip) -> None:
        """Nobody else has its name: whose lease is not on these books never ends."""
        assert (grip.handoff_id, grip.side) not in self._grips
        self._grips[grip.handoff_id, grip.side] = self._by_lease[grip.lease] = grip

    def get(self, handoff_id: bytes, side: str) -> Grip | None:
        return self._grips.get((handoff_id, side))

    def of_engine(self, engine_id: str) -> list[Grip]:
        return [grip for grip in self._grips.values() if grip.engine_id == engine_id]

    def of_lease(self, lease: Lease) -> Grip | None:
        return self._by_lease.get(lease)

    def renew(self, engine_id: str, handoff_ids: Iterable[bytes], now: float) -> None:
        """This engine's, not what others have of the same handoffs."""
        for handoff_id in handoff_ids:
            for side in ("send", "load"):
                grip = self._grips.get((handoff_id, side))
                if grip is not None and grip.engine_id == engine_id:
                    self._desk.store.renew(grip.lease, now=now, ttl_s=self._desk.ports.lease_s)

    def let_go(self, grip: Grip, message: LetGo, *, rank: int | None) -> LetGo | None:
        """The engine promises to be done after `message.fence`; `passed` returns the grip once that is so.

        Is it so already, returns the promise, and the grip is off the books: end its lease now. The first promise
        counts: an engine that is asked again says the same, later. A worker's word, that of `rank`, promises nothing
        before all ranks have given it, and then the last of their fences; the scheduler's (None) is for all of them.
        """
        if rank is not None:
            grip.words.setdefault(rank, message)
            if len(grip.words) < grip.ranks:
                return None
            words = grip.words.values()
            message = next((word for word in words if not word.ok), message)
            message = msgspec.structs.replace(message, fence=max(word.fence for word in words))
        is_new = grip not in self._letting_go
        promise = self._letting_go.setdefault(grip, message)
        if self._desk.ports.fence_passed(grip.engine_id, promise.fence):
            self.remove(grip)
            return promise
        if is_new:
            heappush(self._awaited.setdefault(grip.engine_id, []), (promise.fence, next(self._numbers), grip))
        return None

    def passed(self) -> list[tuple[Grip, LetGo]]:
        """Grips whose fence has passed, removed from the books: end their leases now.

        An engine's steps end in their order, so only the first of its fences that has not passed is looked at.
        """
        done = []
        for engine_id, awaited in list(self._awaited.items()):
            while awaited:
                fence, _, grip = awaited[0]
                promise = self._letting_go.get(grip)
                if promise is not None and not self._desk.ports.fence_passed(engine_id, fence):
                    break
                heappop(awaited)
                if promise is not None:  # else it has been removed since
                    self.remove(grip)
                    done.append((grip, promise))
            if not awaited:
                del self._awaited[engine_id]
        return done

    def unanswered(self, now: float) -> list[Grip]:
        """Grips without a right whose engine has not let go for a whole lease since it was asked: ask it (again).

        Its answer, or our question, was lost: ZeroMQ drops what a stopped engine does not read.
        """
        silent = []
        for grip in self._grips.values():
            if grip.lease.state is not LeaseState.QUARANTINED or grip in self._letting_go:
                continue
            if grip.asked_at is None:  # whoever ended the right has asked just now
                grip.asked_at = now
            elif now - grip.asked_at >= self._desk.ports.lease_s:
                grip.asked_at = now
                silent.append(grip)
        return silent

    def give_way(self) -> list[Grip]:
        """What look-ups have found for requests that may be waiting has no right to its slots any more. Tell its
        engines: what is being loaded they take to the end, the rest they let go."""
        given = [grip for grip in self._grips.values() if grip.yields and grip.lease.state is LeaseState.LIVE]
        for grip in given:
            self._desk.store.revoke(grip.lease)
        return given

    def remove(self, grip: Grip) -> None:
        """Off the books, at once for the grip of an engine that is gone: no fence to wait for."""
        self._grips.pop((grip.handoff_id, grip.side), None)
        self._by_lease.pop(grip.lease, None)
        self._letting_go.pop(grip, None)

    @property
    def pending(self) -> bool:
        return bool(self._letting_go)
