"""Which of the routable engines are asked: not those that are drained or keep failing, nor broken pairs of daemons.

Sans-IO: time is an argument. The directory knows who is there; this knows who is ejected. Soft state: a new
router learns it anew, and a drain has to be told to each router. One thread: the event loop's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from pdx.router.choice.policy import Candidate, Pair, Snapshot
from pdx.router.standing.breaker import Breaker, BreakerSettings, State

# A lane that is down fails every handoff; what heals it (a daemon's new life, a reconnect) takes seconds.
PAIR_BREAKER = BreakerSettings(failure_threshold=3, success_threshold=1, timeout_s=15.0, window_s=60.0, bursts=True)

DaemonPair = tuple[str, str]  # daemon ids: of prefill's, of decode's
Ticket = tuple[Breaker, int]

_log = logging.getLogger(__name__)


class Standing:
    """Drains and breakers of one router."""

    def __init__(self, settings: BreakerSettings) -> None:
        self.drained: set[str] = set()
        self._settings = settings
        self._engines: dict[str, Breaker] = {}
        self._pairs: dict[DaemonPair, Breaker] = {}

    def __repr__(self) -> str:
        pairs = sorted(self.broken_pairs())
        return f"<Standing drained {sorted(self.drained)}, open {[*self.ejected()]}, pairs off {pairs}>"

    def applied(self, snapshot: Iterable[Candidate], now: float) -> Snapshot:
        """Those that may be asked, each with the daemons that it is not to be paired with."""
        shut = {engine_id for engine_id, breaker in self._engines.items() if not breaker.lets_through(now)}
        off: dict[str, set[str]] = {}
        for (prefill, decode), breaker in self._pairs.items():
            if not breaker.lets_through(now):
                off.setdefault(prefill, set()).add(decode)
        asked = [c for c in snapshot if c.engine_id not in shut and c.engine_id not in self.drained]
        if not off:
            return tuple(asked)
        avoid = {daemon: frozenset(others) for daemon, others in off.items()}
        return tuple(
            msgspec.structs.replace(c, avoid=avoid[c.daemon.daemon_id]) if c.daemon.daemon_id in avoid else c
            for c in asked
        )

    def call_began(self, engine_id: str) -> Ticket:
        breaker = self._engines.get(engine_id)
        if breaker is None:
            breaker = self._engines[engine_id] = Breaker(self._settings)
        return breaker, breaker.began()

    def call_ended(self, engine_id: str, ticket: Ticket, *, ok: bool | None, now: float, proved: bool = True) -> None:
        """`ok`: the engine has answered, with whatever but a failure of its own. None: nobody waited for it."""
        breaker, number = ticket
        before = breaker.state
        breaker.ended(number, ok=ok, now=now, proved=proved)
        _tell(breaker, before, "the breaker of engine %s is %s", engine_id)

    def call_went(self, engine_id: str, ticket: Ticket, now: float) -> Ticket:
        """A stream has gone on for a while. The ticket for its end."""
        breaker, number = ticket
        before = breaker.state
        number = breaker.went(number, now=now)
        _tell(breaker, before, "the breaker of engine %s is %s", engine_id)
        return breaker, number

    def handoff_began(self, pair: Pair) -> Ticket:
        breaker = self._pairs.setdefault(_daemons(pair), Breaker(PAIR_BREAKER))
        return breaker, breaker.began()

    def handoff_ended(self, pair: Pair, ticket: Ticket, *, ok: bool | None, now: float) -> None:
        breaker, number = ticket
        before = breaker.state
        breaker.ended(number, ok=ok, now=now)
        _tell(breaker, before, "handoffs from daemon %s to %s: the breaker is %s", *_daemons(pair))

    def renamed(self, before: str, after: str) -> None:
        """The same engine has another name now: who drained it meant the engine."""
        if before in self.drained:
            self.drained.add(after)

    def forget(self, engines: Iterable[str], daemons: Iterable[str]) -> None:
        """Keeps nothing of who has left: whoever comes back under the same name begins anew."""
        engines, daemons = set(engines), set(daemons)
        self.drained &= engines
        self._engines = {e: b for e, b in self._engines.items() if e in engines}
        self._pairs = {pair: b for pair, b in self._pairs.items() if set(pair) <= daemons}

    def ejected(self) -> dict[str, State]:
        """Engines whose breakers are not closed, with the breakers' states."""
        return {engine_id: b.state for engine_id, b in self._engines.items() if b.state != "closed"}

    def broken_pairs(self) -> list[DaemonPair]:
        return [pair for pair, breaker in self._pairs.items() if breaker.state != "closed"]

    def opens_in_s(self, engines: Iterable[str], now: float) -> float:
        """Until the first of these engines is asked again; 0 if none of them is shut."""
        waits = [self._engines[e].reopens_in_s(now) for e in engines if e in self._engines]
        return min((wait for wait in waits if wait > 0), default=0.0)


def _daemons(pair: Pair) -> DaemonPair:
    return pair.prefill.daemon.daemon_id, pair.decode.daemon.daemon_id


def _tell(breaker: Breaker, before: State, words: str, *who: str) -> None:
    if breaker.state != before:
        _log.warning(words, *who, breaker.state)
