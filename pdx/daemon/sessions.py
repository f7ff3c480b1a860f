"""Who is attached: one session per process; of an engine its scheduler, and a worker for each of its ranks.

The kernel tells us of a session's end by the EOF of its Unix socket. A client closes that socket only after it has
unmapped the arena, and a dying process loses its memory before its files, so EOF means: this process touches no slot.
"""

from __future__ import annotations

import itertools
import logging
import socket
from dataclasses import dataclass, field

from pdx.errors import Refused
from pdx.layout import CONTROL_FENCES, PageLayout
from pdx.wire import Attach, EngineInfo, identity_of

ENGINES_MAX = 128
SESSIONS_MAX = 512  # two an engine and more with ranks, the rest tools; well below the usual limit of 1024 descriptors

log = logging.getLogger("pdxd")


@dataclass(eq=False)
class Session:
    """One attached process."""

    number: int
    kind: str
    connection: socket.socket
    identity: bytes  # of its ZeroMQ socket
    engine_id: str = ""
    rank: int | None = None  # of a worker
    fence_offset: int = 0


@dataclass(eq=False)
class Engine:
    """One engine of this host, complete when all of its processes are attached."""

    info: EngineInfo
    routers: frozenset[str] = frozenset()  # where it wants to be announced
    pages: PageLayout | None = None
    scheduler: Session | None = None
    workers: dict[int, Session] = field(default_factory=dict)  # by rank
    running: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0  # at which it computes prompts, as it told last; 0: not known
    leaving: bool = False  # one of its processes has gone: the others belong to the past and will follow

    @property
    def complete(self) -> bool:
        return self.scheduler is not None and len(self.workers) == self.info.layout.ranks


@dataclass
class Sessions:
    """All sessions and engines. Owned by the control thread."""

    incarnation: int
    by_identity: dict[bytes, Session] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def attach(self, hello: Attach, connection: socket.socket) -> Session:
        """Raises Refused: two engines of one name, an engine whose processes do not fit together, too many engines."""
        if len(self.by_identity) >= SESSIONS_MAX:
            raise Refused(f"this daemon serves at most {SESSIONS_MAX} processes")
        number = next(self._numbers)
        session = Session(number, hello.kind, connection, identity_of(self.incarnation, number))
        if hello.kind != "tool":
            self._join_engine(session, hello)
        self.by_identity[session.identity] = session
        return session

    def detach(self, session: Session) -> Engine | None:
        """Forgets a session. Returns its engine, which is no longer complete."""
        self.by_identity.pop(session.identity, None)
        engine = self.engines.get(session.engine_id)
        if engine is None:
            return None
        engine.leaving = True
        if engine.scheduler is session:
            engine.scheduler = None
        if session.rank is not None:
            del engine.workers[session.rank]
        if engine.scheduler is None and not engine.workers:
            del self.engines[session.engine_id]
            log.info("the last process of engine %s has left", session.engine_id)
        return engine

    def _join_engine(self, session: Session, hello: Attach) -> None:
        if hello.engine is None or (hello.kind == "worker") != (hello.pages is not None):
            raise Refused(f"{hello.kind} attached without describing its engine")
        name = hello.engine.engine_id
        engine = self.engines.get(name)
        if engine is not None and (hello.rank in engine.workers if hello.kind == "worker" else engine.scheduler):
            raise Refused(f"an engine called {name!r} is attached already: give each engine its own engine_id")
        if engine is not None and engine.leaving:
            raise Refused(f"an earlier life of engine {name!r} has not quite ended: try again")
        if hello.kind == "worker" and not 0 <= hello.rank < hello.engine.layout.ranks:
            raise Refused(f"engine {name!r} has {hello.engine.layout.ranks} ranks, and no rank {hello.rank}")
        if engine is None:
            if len(self.engines) >= ENGINES_MAX:
                raise Refused(f"this daemon serves at most {ENGINES_MAX} engines")
            engine = Engine(hello.engine)
        if hello.kind == "worker":
            told = hello.engine.completed_by(engine.info)
            if engine.workers and (engine.info, engine.pages) != (told, hello.pages):
                raise Refused(f"the ranks of engine {name!r} differ in model or layout")
            session.rank, session.fence_offset = hello.rank, self._free_fence()
            engine.workers[hello.rank], engine.pages = session, hello.pages
            engine.info = told  # only workers have seen the real caches
        else:
            engine.scheduler = session
            engine.info = engine.info.completed_by(hello.engine)
            engine.routers = frozenset(filter(None, (endpoint.strip() for endpoint in hello.router.split(","))))
        session.engine_id = name
        self.engines[name] = engine
        if engine.complete:
            log.info("engine %s (%s) is here, for %s", name, engine.info.role, engine.info.model)

    def _free_fence(self) -> int:
        taken = {session.fence_offset for session in self.by_identity.values() if session.kind == "worker"}
        for word in range(CONTROL_FENCES):
            if word * 8 not in taken:
                return word * 8
        raise Refused(f"this daemon serves at most {CONTROL_FENCES} workers")
