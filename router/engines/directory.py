"""The live engines, as their daemons announce them and as their /health answers. Sans-IO: time is an argument.

An engine joins with its daemon's Announce and is routable once /health has answered. It leaves when its daemon's
newest Announce lacks it or says goodbye. A daemon that falls silent only takes the right to pair with it: its engines
can still serve alone while /health answers, until ORPHAN_S have passed without a daemon adopting them.

One thread: the event loop's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pdx.keys import space_of
from pdx.router.choice.policy import Candidate, Snapshot, same_server
from pdx.router.live.values import Health
from pdx.wire import Announce, DaemonRef, EngineInfo, EngineLoad

NOBODY = DaemonRef(daemon_id="", incarnation=0, control="", lanes=[])  # whose engines those are that operators name
DAEMON_SILENT_S = 3.5  # announcements come every second: three were lost
ORPHAN_S = 60.0  # a restarted daemon gets its engines back within seconds
HEALTH_JOINING_S = 0.5
HEALTH_STEADY_S = 5.0
# A busy API server may miss one poll; a refused connection is reported as `unreachable` and counts at once.
HEALTH_FAILURES_MAX = 2
SILENT_DAEMON_S = 600.0  # for so long it is told that nobody hears one that has not said goodbye
SILENT_DAEMONS_MAX = 1024
ENGINES_MAX = 4096  # of a whole fleet; protects the router's memory against a daemon gone mad

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownEngine:
    """An announced engine, routable or not. `health` as in live.EngineRow."""

    info: EngineInfo
    daemon: DaemonRef
    health: Health
    waiting: int


@dataclass(frozen=True, slots=True)
class KnownDaemon:
    ref: DaemonRef
    heard_at: float


@dataclass(slots=True)
class _Engine:
    info: EngineInfo
    daemon: DaemonRef
    heard_at: float
    poll_at: float
    pairable: bool = True
    ready: bool = False
    failures: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0
    was_ready: bool = False
    space: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.space = space_of(self.info.content, self.info.layout)

    @property
    def health(self) -> Health:
        if self.ready:
            return "ready" if self.pairable else "alone"
        return "lost" if self.was_ready else "joining"


@dataclass(slots=True)
class _Daemon:
    ref: DaemonRef
    heard_at: float
    reservations_waiting: int = 0
    links: dict[str, float] = field(default_factory=dict)  # daemon id -> bytes a second


class Directory:
    """Who is there. All times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._daemons: dict[str, _Daemon] = {}
        self._silent: OrderedDict[str, float] = OrderedDict()  # daemon id -> heard last, oldest first
        self._engines: dict[str, _Engine] = {}
        self._seen: Snapshot | None = None  # until something changes
        # Told when a named engine gives way to the one that a daemon announces at its address: both ids.
        self.renamed: Callable[[str, str], None] = lambda named, announced: None

    def __repr__(self) -> str:
        ready = sum(engine.ready for engine in self._engines.values())
        return f"<Directory {len(self._daemons)} daemons, {len(self._engines)} engines, {ready} ready>"

    def on_announce(self, announce: Announce, now: float) -> list[str]:
        """Takes in what a daemon serves; returns warnings for its operator."""
        self._seen = None
        ref = announce.daemon
        self._silent.pop(ref.daemon_id, None)
        if announce.leaving:
            self._daemons.pop(ref.daemon_id, None)
            self._orphan(ref.daemon_id)
            return []
        if not self.knows_daemon(ref):
            self._orphan(ref.daemon_id)  # a new incarnation: its engines attach again one by one
        links = {link.daemon_id: link.bytes_per_s for link in announce.links}
        self._daemons[ref.daemon_id] = _Daemon(ref, now, announce.reservations_waiting, links)
        loads = {load.engine_id: load for load in announce.loads}
        warnings = []
        for info in announce.engines:
            warning = self._reason_to_refuse(info, ref)
            if warning:
                warnings.append(warning)
            elif info.url:
                self._replace_named(info)
                self._join(info, ref, now)
                load = loads.get(info.engine_id, EngineLoad(engine_id=info.engine_id))
                engine = self._engines[info.engine_id]
                engine.waiting, engine.tokens_per_s = load.waiting, load.tokens_per_s
        listed = {info.engine_id for info in announce.engines}
        for engine_id, engine in list(self._engines.items()):
            if _same_daemon(engine.daemon, ref) and engine_id not in listed:
                self._leave(engine_id, "its daemon no longer announces it")
        return warnings

    def on_named(self, info: EngineInfo, now: float) -> None:
        """An engine that an operator has named. It gives way to one that a daemon announces under the same address."""
        self._seen = None
        if info.url.rstrip("/") not in self.urls(announced=True):
            self._join(info, NOBODY, now)
            self._engines[info.engine_id].pairable = False

    def on_health(self, engine_id: str, url: str, ok: bool, now: float) -> None:
        """The answer of one poll of /health there. One that has left meanwhile, or moved, is not meant by it."""
        self._seen = None
        engine = self._engines.get(engine_id)
        if engine is None or engine.info.url != url:
            return
        if ok:
            if not engine.ready:
                _log.info("engine %s (%s) is ready at %s", engine_id, engine.info.role, engine.info.url)
            engine.ready, engine.failures, engine.poll_at = True, 0, now + HEALTH_STEADY_S
            engine.was_ready = True
            return
        engine.failures += 1
        if engine.ready and engine.failures >= HEALTH_FAILURES_MAX:
            _log.warning("engine %s stopped answering /health", engine_id)
            engine.ready = False
        engine.poll_at = now + HEALTH_JOINING_S

    def on_unreachable(self, engine_id: str, now: float) -> None:
        """A request could not connect there: not routable before /health answers again."""
        self._seen = None
        tried = self._engines.get(engine_id)
        for each_id, engine in self._engines.items():
            behind_it = tried is not None and (engine is tried or same_server(engine.info, tried.info))
            if behind_it and engine.ready:
                _log.warning("engine %s can't be reached", each_id)
                engine.ready = False
                engine.poll_at = now + HEALTH_JOINING_S

    def due_polls(self, now: float) -> list[tuple[str, str]]:
        """(engine id, url) whose /health should be asked now; each is due again after its answer."""
        due = [(engine_id, engine.info.url) for engine_id, engine in self._engines.items() if engine.poll_at <= now]
        for engine_id, _ in due:
            self._engines[engine_id].poll_at = now + HEALTH_STEADY_S
        return due

    def expire(self, now: float) -> list[str]:
        """Forgets silent daemons and abandoned engines; returns the daemons' ids."""
        silent = [d.ref.daemon_id for d in self._daemons.values() if now - d.heard_at > DAEMON_SILENT_S]
        for daemon_id in silent:
            _log.warning("daemon %s has been silent for %.1f s", daemon_id, DAEMON_SILENT_S)
            self._silent[daemon_id] = self._daemons.pop(daemon_id).heard_at
            self._orphan(daemon_id)
        while self._silent and (
            len(self._silent) > SILENT_DAEMONS_MAX or now - next(iter(self._silent.values())) > SILENT_DAEMON_S
        ):
            self._silent.popitem(last=False)
        for engine_id, engine in list(self._engines.items()):
            named = engine.daemon is NOBODY  # and may get ready as long as it says what it serves
            if not engine.pairable and (now - engine.heard_at > ORPHAN_S or not (engine.ready or named)):
                self._leave(engine_id, "it is gone" if named else "its daemon is gone")
        return silent

    def snapshot(self) -> Snapshot:
        """The routable engines: the same object until something has changed."""
        if self._seen is None:
            self._seen = tuple(
                Candidate(
                    info=e.info, daemon=e.daemon, pairable=e.pairable, waiting=e.waiting, space=e.space,
                    told_tokens_per_s=e.tokens_per_s, links=self._links_of(e.daemon),
                )
                for e in self._engines.values()
                if e.ready
            )  # fmt: skip
        return self._seen

    def knows_daemon(self, ref: DaemonRef) -> bool:
        """Whether this very incarnation is alive."""
        daemon = self._daemons.get(ref.daemon_id)
        return daemon is not None and _same_daemon(daemon.ref, ref)

    def daemons(self) -> list[DaemonRef]:
        """Those that are alive."""
        return [daemon.ref for daemon in self._daemons.values()]

    def silent_daemons(self) -> list[str]:
        """Those that nobody hears, that have not said goodbye, and whose engines no other has taken over."""
        return list(self._silent)

    def known_daemons(self) -> list[KnownDaemon]:
        """The same, with when each was heard last."""
        return [KnownDaemon(daemon.ref, daemon.heard_at) for daemon in self._daemons.values()]

    def known_engines(self) -> list[KnownEngine]:
        """All that have been announced and have not left."""
        return [KnownEngine(e.info, e.daemon, e.health, e.waiting) for e in self._engines.values()]

    def models(self) -> list[str]:
        """Every model that some announced engine serves, ready or not."""
        return sorted({model for engine in self._engines.values() for model in engine.info.models})

    def engines(self) -> list[str]:
        """All that have been announced, ready or not."""
        return list(self._engines)

    def urls(self, *, announced: bool = False) -> set[str]:
        """Where engines are, or only those that some daemon announces."""
        return {e.info.url.rstrip("/") for e in self._engines.values() if not announced or e.daemon is not NOBODY}

    def joining(self) -> list[str]:
        """Engines that have been announced and have not answered /health yet."""
        return sorted(engine_id for engine_id, engine in self._engines.items() if not engine.ready)

    def reservations_waiting(self) -> int:
        return sum(daemon.reservations_waiting for daemon in self._daemons.values())

    def _reason_to_refuse(self, info: EngineInfo, ref: DaemonRef) -> str:
        if info.url and not _is_http(info.url):
            return f"engine {info.engine_id}: {info.url!r} is not an http url"
        known = self._engines.get(info.engine_id)
        if known is None:
            return f"more than {ENGINES_MAX} engines" if len(self._engines) >= ENGINES_MAX else ""
        if known.pairable and known.daemon.daemon_id != ref.daemon_id and known.info.url != info.url:
            return f"engine id {info.engine_id} is taken by {known.info.url}"
        return ""

    def _join(self, info: EngineInfo, ref: DaemonRef, now: float) -> None:
        known = self._engines.get(info.engine_id)
        if known is None or known.info.at(info.content.weight_epoch) != info:
            self._engines[info.engine_id] = _Engine(info, ref, heard_at=now, poll_at=now)
            return
        # The same engine, heard again: perhaps with other weights, or through a new incarnation of its daemon.
        if known.info.content != info.content:
            known.space = space_of(info.content, info.layout)
        if not _same_daemon(known.daemon, ref):
            self._silent.pop(known.daemon.daemon_id, None)  # its place is taken: it has ended
        known.info, known.daemon, known.heard_at, known.pairable = info, ref, now, True

    def _links_of(self, ref: DaemonRef) -> dict[str, float]:
        daemon = self._daemons.get(ref.daemon_id)
        return daemon.links if daemon is not None else {}

    def _replace_named(self, info: EngineInfo) -> None:
        for engine_id, engine in list(self._engines.items()):
            if engine.daemon is NOBODY and engine.info.url.rstrip("/") == info.url.rstrip("/"):
                self._leave(engine_id, f"its daemon announces it as {info.engine_id}")
                self.renamed(engine_id, info.engine_id)

    def _orphan(self, daemon_id: str) -> None:
        self._seen = None
        for engine in self._engines.values():
            if engine.daemon.daemon_id == daemon_id:
                engine.pairable = False

    def _leave(self, engine_id: str, why: str) -> None:
        self._seen = None
        _log.info("engine %s leaves: %s", engine_id, why)
        del self._engines[engine_id]


def _is_http(url: str) -> bool:
    try:
        return urlsplit(url).scheme in ("http", "https")
    except ValueError:  # e.g. half an IPv6 address
        return False


def _same_daemon(one: DaemonRef, other: DaemonRef) -> bool:
    return (one.daemon_id, one.incarnation) == (other.daemon_id, other.incarnation)
