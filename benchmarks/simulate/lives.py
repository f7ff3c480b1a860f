"""An engine's two processes and their attachments: how they die, start again, lose their daemon and find the next."""

from __future__ import annotations

from benchmarks.simulate.host import IPC_S, Host, decode_engine, decode_to_engine
from benchmarks.simulate.prompts import PAGES
from benchmarks.simulate.work import Tie
from benchmarks.simulate.worker import SimulatedWorker
from benchmarks.simulate.world import Link, Process, World
from pdx.errors import Refused
from pdx.wire import Attach, EngineInfo, Message

REATTACH_S = 0.5


class Engine(Process):
    """The scheduler process; `worker` is the other one. What it serves is the subclass's business."""

    def __init__(self, world: World, host: Host, info: EngineInfo, worker: SimulatedWorker) -> None:
        super().__init__(world, info.engine_id)
        self.info = info
        self.host = host
        self.worker = worker
        self.tie: Tie | None = None
        self.from_daemon = Link(world, self, self._hear, delay_s=IPC_S, decode=decode_to_engine, lossy=True)
        self._attach_both()

    # --- for the subclass -------------------------------------------------------------------------------------

    def _hear(self, message: Message) -> None:
        """From the daemon."""
        raise NotImplementedError

    def _unmapped(self) -> None:
        """The worker has died, and touches nothing."""
        raise NotImplementedError

    def _scheduler_died(self) -> None:
        raise NotImplementedError

    def _born_again(self) -> None:
        """A new life, without memory of the old one."""
        raise NotImplementedError

    def _claims_lost(self) -> None:
        """The daemon is gone, and every right with it."""
        raise NotImplementedError

    # --- lives ------------------------------------------------------------------------------------------------

    def kill(self, *, worker_first: bool, apart_s: float) -> None:
        """kill -9 of both processes, one a little later."""
        first, second = (self._kill_worker, self._kill_scheduler)[:: 1 if worker_first else -1]
        first()
        self.world.later(apart_s, second)

    def _kill_worker(self) -> None:
        if self.worker.alive:
            self.world.note(self.name, "worker dies")
            self.worker.die()
            self._unmapped()
            self._end_session(self.worker.tie)
            self.worker.tie = None

    def _kill_scheduler(self) -> None:
        if self.alive:
            self.world.note(self.name, "scheduler dies")
            self.die()
            self._scheduler_died()
            self._end_session(self.tie)
            self.tie = None

    def _end_session(self, tie: Tie | None) -> None:
        if tie is not None and tie.incarnation == tie.host.me.incarnation:
            self.world.later(IPC_S, tie.host.put_in, tie.host.ended, tie.session)

    def restart(self) -> None:
        self._kill_worker()
        self._kill_scheduler()
        self._born_again()
        self.asleep_until = self.worker.asleep_until = 0.0
        self.be_born()
        self.worker.be_born()
        self.world.note(self.name, "starts")
        self._attach_both()

    def daemon_died(self, host: Host) -> None:
        """The ends of both connections: each process notices by itself."""
        self.later(IPC_S, self._lost_daemon, host.me.incarnation)
        self.worker.later(IPC_S, self._worker_lost_daemon, host.me.incarnation)

    def _lost_daemon(self, incarnation: int) -> None:
        if self.tie is None or self.tie.incarnation != incarnation:
            return
        self.tie = None
        self._claims_lost()
        self.later(REATTACH_S * (0.5 + self.world.chance.random()), self._attach, "scheduler")

    def _worker_lost_daemon(self, incarnation: int) -> None:
        if self.worker.tie is not None and self.worker.tie.incarnation == incarnation:
            self.worker.tie = None
            self.worker.later(REATTACH_S * (0.5 + self.world.chance.random()), self._attach, "worker")

    def _attach_both(self) -> None:
        self.later(0.01 * self.world.chance.random(), self._attach, "scheduler")
        self.worker.later(0.01 * self.world.chance.random(), self._attach, "worker")

    def _attach(self, kind: str) -> None:
        process: Process = self if kind == "scheduler" else self.worker
        host = self.host
        pages = PAGES if kind == "worker" else None
        try:
            if not host.alive or host.asleep_until > self.world.now:
                raise Refused("no daemon answers")
            session = host.attach(Attach(kind=kind, engine=self.info, pages=pages, router="r"), self)  # type: ignore[arg-type]
        except Refused:
            process.later(REATTACH_S, self._attach, kind)
            return

        def arrive(message: Message) -> None:
            host.put_in(host.from_client, session, message)

        out = Link(self.world, host, arrive, delay_s=IPC_S, decode=decode_engine, lossy=True)
        tie = Tie(host, host.me.incarnation, session, host.arena, out)
        if kind == "worker":
            self.worker.tie = tie
        else:
            self.tie = tie
            self.from_daemon = Link(self.world, self, self._hear, delay_s=IPC_S, decode=decode_to_engine, lossy=True)

    def lose_messages(self) -> None:
        """Whatever is under way between this engine and its daemon is lost."""
        self.from_daemon.lose()
        for tie in (self.tie, self.worker.tie):
            if tie is not None:
                tie.out.lose()
