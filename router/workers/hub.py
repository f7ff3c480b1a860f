"""The process that several workers of one router share: it has the control socket, and adds up the metrics.

To daemons it is the router: what they say goes to every worker, what a worker says goes to the daemon that it names.
(Cancels and questions bear ids that one worker knows; the answers go to all, and mean nothing to the others.) A worker
that follows a dead one hears at once what each daemon has announced last. Frames that are none of the protocol's end
here.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import zmq
import zmq.asyncio

from pdx.errors import VersionMismatch, WireError
from pdx.router.engines.control import HELLO, NEW, TOLD, ControlSocket
from pdx.router.engines.directory import DAEMON_SILENT_S
from pdx.router.engines.registry import DAEMONS_MAX
from pdx.router.engines.versions import OtherVersions
from pdx.router.metrics import Metrics, Moment
from pdx.router.workers.merging import Totals
from pdx.router.workers.texts import read_text
from pdx.wire import ROUTER, Announce, decoder_of

HEARD_S = 1.5  # after its start daemons have connected again and said that they are there, as they do every second
HUNG_ASK_S = 5.0  # a worker may be busy for seconds, with a large body say
HUNG_ASKS = 2  # in a row: one may be lost when all of the host was stopped for a while

_decode = decoder_of(ROUTER)


class Places:
    """Names of sockets within a private folder of this router."""

    def __init__(self, folder: Path) -> None:
        self.control = f"ipc://{folder}/control"
        self.metrics = folder / "metrics"
        self.folder = folder

    def metrics_of(self, worker: int, life: int) -> Path:
        return self.folder / f"metrics-{worker}-{life}"


class Hub:
    """Forwards until cancelled."""

    def __init__(self, control: ControlSocket, places: Places, metrics: Metrics) -> None:
        """Binds the workers' side."""
        self._control = control
        self._metrics = metrics
        self._others = OtherVersions(control)
        self._began_at = time.monotonic()
        self._workers: set[bytes] = set()
        self._announced: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()  # name -> when, frame; oldest first
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.router_handover = True  # a worker that was started anew has the old one's name
        self._socket.bind(places.control)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._control.run())
            tasks.create_task(self._to_workers())
            tasks.create_task(self._to_daemons())

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    async def _to_workers(self) -> None:
        while True:
            frames = await self._control.receive()
            try:
                if len(frames) != 2:
                    raise WireError(f"{len(frames)} frames instead of 2")
                message = _decode(frames[1])
            except VersionMismatch as error:
                self._metrics.bad_frames.inc()
                await self._others.met(frames[0], error)
                continue
            except WireError:
                self._metrics.bad_frames.inc()
                continue
            if isinstance(message, Announce):
                self._remember(*frames, leaving=message.leaving)
            for worker in list(self._workers):
                try:
                    await self._socket.send_multipart([worker, *frames], flags=zmq.NOBLOCK)
                except zmq.ZMQError:  # it has ended, and says hello when it is back; or it hears nothing any more
                    self._workers.discard(worker)

    async def _to_daemons(self) -> None:
        while True:
            worker, *frames = await self._socket.recv_multipart()
            if frames == [HELLO, NEW]:
                await self._tell(worker)
            self._workers.add(worker)
            if len(frames) != 2 or not frames[0]:
                continue  # its hello
            try:
                await self._control.send(*frames)
            except zmq.ZMQError:
                self._metrics.undelivered.inc()

    def _remember(self, name: bytes, frame: bytes, *, leaving: bool) -> None:
        self._announced.pop(name, None)
        if not leaving:
            self._announced[name] = time.monotonic(), frame
        if len(self._announced) > DAEMONS_MAX:
            self._announced.popitem(last=False)

    async def _tell(self, worker: bytes) -> None:
        """A new one what it has missed, less what is so old that it would be forgotten by now. It asks until that is
        all: a hub that was started anew itself has to hear it first."""
        now = time.monotonic()
        words = [[name, frame] for name, (at, frame) in self._announced.items() if now - at < DAEMON_SILENT_S]
        if now - self._began_at >= HEARD_S:
            words.append([HELLO, TOLD])
        with suppress(zmq.ZMQError):  # more than there is room for: it hears the rest within a second
            for frames in words:
                await self._socket.send_multipart([worker, *frames], flags=zmq.NOBLOCK)


class AddedUp:
    """The metrics of all workers that there have ever been, and of the hub itself."""

    def __init__(self, places: Places, own: Metrics) -> None:
        self._places = places
        self._own = own
        self._totals = Totals()
        self._unanswered: dict[str, int] = {}

    async def refresh(self) -> list[str]:
        """Asks them all. The names of those that have not answered HUNG_ASKS times, each once."""
        paths = sorted(self._places.folder.glob("metrics-*"))
        texts = await asyncio.gather(*(read_text(path, HUNG_ASK_S) for path in paths))
        said = {path.name: text for path, text in zip(paths, texts, strict=True)}
        self._totals.heard({name: text or b"" for name, text in said.items()})
        self._unanswered = {name: self._unanswered.get(name, 0) + 1 for name, text in said.items() if text is None}
        return [name for name, asks in self._unanswered.items() if asks == HUNG_ASKS]

    def text(self) -> bytes:
        return self._totals.added(self._own.render(Moment()))
