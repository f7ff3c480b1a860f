"""`--workers N`: N processes serve one port (SO_REUSEPORT), a hub hears the daemons for them, and one starts them all.

It forks before there is any loop or thread, and holds nothing but their ids: what it was told at its start is what a
worker that follows a dead one is told. Its own death, however sudden, ends all of them by the pipe that they watch. A
killed worker takes its connections with it, and up to REFRESH_S of its counters; a killed hub those of ended workers.
A worker that hangs is killed when the hub says so, and whatever has not ended in time after a signal.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import msgspec
import uvloop
import zmq

from pdx.addresses import authority, family_of
from pdx.errors import ConfigError
from pdx.router.engines.control import ControlSocket
from pdx.router.metrics import Metrics
from pdx.router.service import CLOSE_S, Options, serve
from pdx.router.workers.hub import HUNG_ASK_S, HUNG_ASKS, AddedUp, Hub, Places
from pdx.router.workers.texts import serve_text

RESTARTS_MAX = 10  # within RESTARTS_S, of all together: then something is wrong that starting anew does not mend
RESTARTS_S = 60.0
REFRESH_S = 1.0  # how much of its counters a killed worker takes with it, if none hangs (HUNG_ASK_S)
HUB_START_S = 30.0  # it binds three sockets, in milliseconds: one that takes longer hangs
HUB_LOOK_S = 0.1  # while it starts: how late a signal is seen
LOOK_S = 1.0  # how late it is seen what the hub says
END_S = 2.0  # whoever is to end, and hears of it, needs milliseconds for what is not draining or closing
HUB = -1
STOPS = (signal.SIGINT, signal.SIGTERM)
WATCHED = {*STOPS, signal.SIGCHLD}
EXIT_CONFIG = 2  # as of the program: to start it anew would not mend it

_log = logging.getLogger(__name__)


class Workers:
    """The children, by number. Owned by the process that forks, which must have no threads."""

    def __init__(self, options: Options, count: int, places: Places, *, life: int, alive: int) -> None:
        """`life` and `alive`: the ends of a pipe that nobody writes into; the second closes with this process."""
        self._options = options
        self._count = count
        self._places = places
        self._life = life
        self._alive = alive
        self._pids: dict[int, int] = {}  # process id -> HUB, or the worker's number
        self._lives = 0
        self._restarts: list[float] = []
        self._stopping = False
        self._kill_at = math.inf  # who has not ended by then never will
        self._sockets: dict[int, tuple[str, int]] = {}  # worker -> its metrics socket's name, its process id
        self._hub_says: int | None = None  # a pipe of such names, a line each: nobody answers there any more

    def run(self) -> int:
        """Starts them and waits until all have ended. Exit status: theirs, if it was not asked for.

        Signals are waited for and never handled: one that comes between two calls is there at the next wait, and all
        whom it concerns have been started by then.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as it may be inherited, it would never come
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        self._start_hub()
        status = 0
        while self._pids:
            left_s = max(0.0, self._kill_at - time.monotonic())
            received = signal.sigtimedwait(WATCHED, min(left_s, LOOK_S))
            if received is not None and received.si_signo != signal.SIGCHLD:
                self._stop(received.si_signo)
            for who, ended in self._ended():
                status = self._on_end(who, ended) or status
            self._kill_hung()
        return max(status, 0) or (1 if status else 0)

    def _ended(self) -> Iterator[tuple[int, int]]:
        """Who has ended since the last look, and how."""
        while self._pids:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid in self._pids:
                yield self._pids.pop(pid), os.waitstatus_to_exitcode(ended)

    def _on_end(self, who: int, ended: int) -> int:
        """The exit status if this end is the end of all; else 0."""
        if self._stopping:
            if list(self._pids.values()) == [HUB]:
                self._pass_on(signal.SIGTERM)  # nobody has anything to say to daemons any more
            return 0
        if ended == EXIT_CONFIG or not self._may_restart():
            self._stop(signal.SIGTERM)
            return ended or 1
        _log.warning("%s has ended (%d): starting it anew", _name_of(who), ended)
        if who == HUB:
            self._start_hub()
        else:
            self._start_worker(who)
        return 0

    def _kill_hung(self) -> None:
        """Those that the hub names, whom others then replace; after a signal whoever is left when its time is over."""
        if self._stopping:
            if self._pids and time.monotonic() >= self._kill_at:
                _log.warning("%s did not end in time: killed", ", ".join(map(_name_of, self._pids.values())))
                self._kill_at = math.inf
                self._pass_on(signal.SIGKILL)
            return
        hung = self._hung()
        for worker, (name, pid) in self._sockets.items():
            if name in hung and pid in self._pids:
                _log.warning("%s hangs: asked %d times, no answer in %g s", _name_of(worker), HUNG_ASKS, HUNG_ASK_S)
                os.kill(pid, signal.SIGKILL)

    def _hung(self) -> list[str]:
        if self._hub_says is None or not select.select([self._hub_says], [], [], 0)[0]:
            return []
        return os.read(self._hub_says, select.PIPE_BUF).decode().split()

    def _stop(self, number: int) -> None:
        """A second signal is passed on like the first. The hub goes on for the workers, as long as they drain."""
        again, self._stopping = self._stopping, True
        given_s = END_S if again else self._options.drain_s + CLOSE_S + END_S
        self._kill_at = min(self._kill_at, time.monotonic() + given_s)
        self._pass_on(number, to_hub=again or len(self._pids) == 1)

    def _pass_on(self, number: int, *, to_hub: bool = True) -> None:
        for pid, who in self._pids.items():
            if who != HUB or to_hub:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < RESTARTS_S] + [now]
        return len(self._restarts) <= RESTARTS_MAX

    def _start_hub(self) -> None:
        """And the workers, as soon as one has said where daemons are to connect."""
        reader, writer = os.pipe()
        with suppress(FileNotFoundError):
            self._places.metrics.unlink()

        def hub() -> None:
            os.close(reader)
            uvloop.run(_serve_hub(self._options, self._places, says=writer, life=self._life))

        pid = self._fork(HUB, hub)
        os.close(writer)
        endpoint = _said(reader)
        if self._hub_says is not None:
            os.close(self._hub_says)
        self._hub_says = reader
        if endpoint is None:
            os.kill(pid, signal.SIGKILL)
        if endpoint and not self._lives:
            self._options = msgspec.structs.replace(self._options, control=endpoint)
            for worker in range(self._count):
                self._start_worker(worker)

    def _start_worker(self, worker: int) -> None:
        self._lives += 1
        metrics = self._places.metrics_of(worker, self._lives)
        for old in self._places.folder.glob(f"metrics-{worker}-*"):
            old.unlink()
        first = worker == 0
        options = msgspec.structs.replace(
            self._options,
            hub=self._places.control,
            worker=worker,
            follows=self._lives > self._count,
            own_metrics=str(metrics),
            all_metrics=str(self._places.metrics),
            admin_port=self._options.admin_port if first else None,
            publish=self._options.publish if first else "",
            life=self._life,
        )
        self._sockets[worker] = metrics.name, self._fork(worker, lambda: uvloop.run(serve(options)))

    def _fork(self, who: int, child: Callable[[], None]) -> int:
        pid = os.fork()
        if not pid:
            os.close(self._alive)
            _be(child)
        self._pids[pid] = who
        return pid


def lead(options: Options, count: int) -> int:
    """Serves with so many workers until SIGINT or SIGTERM. Exit status as of one. Raises ConfigError."""
    with ExitStack() as stack:
        # Bound, never listening: it keeps the port, and says which one it is if any would do.
        held = stack.enter_context(socket.socket(family_of(options.host)))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            with socket.socket(family_of(options.host)) as alone:  # which finds out another router's workers, too
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind((options.host, options.port))
            held.bind((options.host, options.port))
        except OSError as error:
            where = authority(options.host, options.port)
            raise ConfigError(f"can't listen on {where}: {error.strerror or error}") from error
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pdx-router-", ignore_cleanup_errors=True))
        life, alive = os.pipe()
        stack.callback(os.close, life)
        stack.callback(os.close, alive)
        options = msgspec.structs.replace(options, port=held.getsockname()[1])
        return Workers(options, count, Places(Path(folder)), life=life, alive=alive).run()


async def _serve_hub(options: Options, places: Places, *, says: int, life: int) -> None:
    """`says`: a pipe for where daemons are to connect, and then the names of sockets at which nobody answers."""
    metrics = Metrics()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOPS:
        loop.add_signal_handler(number, stop.set)

    def orphaned() -> None:
        shutil.rmtree(places.folder, ignore_errors=True)  # who made it can't any more
        stop.set()

    loop.add_reader(life, orphaned)
    async with AsyncExitStack() as stack:
        control = ControlSocket(options.control, cluster_key=options.settings.cluster_key, metrics=metrics)
        stack.callback(control.close)
        try:
            hub = Hub(control, places, metrics)
        except zmq.ZMQError as error:
            raise ConfigError(f"no socket in {places.folder}: {error}; TMPDIR may be too long a name") from error
        stack.callback(hub.close)
        added = AddedUp(places, metrics)
        await serve_text(stack, places.metrics, added.text)
        os.write(says, control.endpoint.encode())
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(hub.run()), tasks.create_task(_refresh(added, says))]
            await stop.wait()
            for task in running:
                task.cancel()


async def _refresh(added: AddedUp, says: int) -> None:
    while True:
        for name in await added.refresh():
            os.write(says, f"{name}\n".encode())
        await asyncio.sleep(REFRESH_S)


def _name_of(who: int) -> str:
    return "the hub" if who == HUB else f"worker {who}"


def _said(reader: int) -> str | None:
    """By a hub that starts: where it listens, or nothing if it has ended. None: it hangs, or is not wanted any more."""
    ends_at = time.monotonic() + HUB_START_S
    while not select.select([reader], [], [], HUB_LOOK_S)[0]:
        if time.monotonic() >= ends_at or signal.sigpending() & set(STOPS):
            return None
    return os.read(reader, select.PIPE_BUF).decode()


def _be(child: Callable[[], None]) -> NoReturn:
    """What a forked process does, and no more. It tells its failures as the program tells them."""
    status = 1
    try:
        os.setpgid(0, 0)  # a terminal's Ctrl-C goes to the process that passes signals on
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it has its own: Python's would tell of an exception
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        child()
        status = 0
    except ConfigError as error:
        os.write(2, f"pdx-router: {error}\n".encode())
        status = EXIT_CONFIG
    except Exception:  # noqa: BLE001 - the top of a process
        _log.exception("a process of this router failed")
    finally:
        os._exit(status)
