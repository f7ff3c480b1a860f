"""A running router: binds its sockets, keeps the directory true, and ends cleanly. Only wires the other parts."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec
from aiohttp import web

from pdx.addresses import authority
from pdx.config import is_loopback
from pdx.errors import ConfigError
from pdx.router.choice.knowledge import Knowledge
from pdx.router.engines.control import Control, ControlSocket, SharedControl
from pdx.router.engines.daemons import Daemons
from pdx.router.engines.directory import Directory
from pdx.router.engines.named import Named
from pdx.router.engines.registry import Registry
from pdx.router.engines.upstream import Upstream
from pdx.router.front.admin import Admin
from pdx.router.front.app import Door, Front
from pdx.router.front.drains import Drains
from pdx.router.front.listener import HEADER_BYTES_MAX, Listener
from pdx.router.line.gate import Gate
from pdx.router.live.feed import LiveFeed
from pdx.router.metrics import Metrics
from pdx.router.outside import Outside
from pdx.router.request.pending import Pending
from pdx.router.request.settings import Settings
from pdx.router.request_log import RequestLog
from pdx.router.standing.breaker import BreakerSettings
from pdx.router.standing.standing import Standing
from pdx.router.workers.texts import serve_text
from pdx.whole import remove, write_whole
from pdx.wire import Announce

LATE_S = 1.0  # a turn that comes so much later than it should has not heard of anybody meanwhile
TICK_S = 0.1  # resolution of health polls and of a silent daemon's expiry
DRAIN_LOOK_S = 0.02  # how often a draining router looks whether the last request has ended
CLOSE_S = 0.5  # connections get this long when all is over
CATCH_UP_S = 3.0  # a worker that follows another listens after so long, whatever it has heard of engines
CATCH_UP_LOOK_S = 0.02

_log = logging.getLogger(__name__)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a router listens, and to whom."""

    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8000
    control: str = "tcp://127.0.0.1:5700"
    door: Door = Door()
    idle_s: float = 60.0  # a connection without a whole request head for so long is closed
    prefills: tuple[str, ...] = ()  # engines that an operator has named, by address
    decodes: tuple[str, ...] = ()
    queue_size: int = 100  # requests that wait for an engine with room
    queue_timeout_s: float = 60.0
    breaker: BreakerSettings = BreakerSettings()
    drain_s: float = 30.0  # what is under way at the first signal gets this long
    workers: int = 1
    worker: int = 0  # which of them this is; it shares its port if it has a hub
    follows: bool = False  # another worker of that number, which others did without meanwhile
    hub: str = ""  # where workers of one router get what daemons say; empty: this is the only one
    own_metrics: str = ""  # the Unix socket where this worker tells its metrics, and the one that has those of all
    all_metrics: str = ""
    life: int | None = None  # a descriptor that can be read when the process is gone that started this one
    publish: str = ""
    request_log: str = ""  # a file, or "-" for stdout; empty: none
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # None: no admin port
    admin_token: str = ""


class Published(msgspec.Struct, frozen=True):
    """Where a router listens: what --publish writes."""

    http: str
    control: str
    admin: str = ""


class Router(msgspec.Struct, frozen=True):
    """A router that serves."""

    published: Published
    outside: Outside
    keeper: asyncio.Task[None]  # its end would be the router's failure


async def serve(options: Options) -> None:
    """Until SIGINT or SIGTERM, then drains; a second one ends it at once. Raises ConfigError if it can't listen."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    if options.life is not None:
        loop.add_reader(options.life, _orphaned, signals, options.life)
    if options.publish and not options.follows:  # who waits for it must not read what an earlier router has left
        remove(Path(options.publish))
    async with running(options) as router:
        published, keeper = router.published, router.keeper
        _log.info("listening on %s, control on %s", published.http, published.control)
        if published.admin:
            _log.info("admin port at %s, %s a token", published.admin, "with" if options.admin_token else "without")
        if options.publish:
            write_whole(Path(options.publish), msgspec.json.encode(published))
        gc.collect()
        gc.freeze()  # what was imported stays: to look through it takes 10 ms, in which no stream moves
        stopped = asyncio.create_task(signals.get())
        await asyncio.wait({stopped, keeper}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if keeper.done():
            keeper.result()
        again = asyncio.create_task(signals.get())
        drained = asyncio.create_task(drain(router.outside, options.drain_s))
        await asyncio.wait({again, drained}, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        drained.cancel()
    _log.info("stopped")


async def drain(outside: Outside, drain_s: float) -> None:
    """Turns away who comes and who waits, and lets what is under way end, for at most so long."""
    outside.gate.drain()
    if outside.under_way:
        _log.info("%d requests under way get %g s to end", outside.under_way, drain_s)
    ends_at = time.monotonic() + drain_s
    while outside.under_way and time.monotonic() < ends_at:  # noqa: ASYNC110 - each request would have to tell
        await asyncio.sleep(DRAIN_LOOK_S)
    if outside.under_way:
        _log.warning("%d requests did not end in %g s", outside.under_way, drain_s)


@asynccontextmanager
async def running(options: Options) -> AsyncIterator[Router]:
    """A listening router. Leaving the block ends it within CLOSE_S, whatever is under way."""
    directory, metrics, pending, knowledge = Directory(), Metrics(), Pending(), Knowledge()
    gate = Gate(queue_size=options.queue_size, queue_timeout_s=options.queue_timeout_s)

    def heard(announce: Announce) -> list[str]:
        warnings = directory.on_announce(announce, time.monotonic())
        gate.stir()  # a line has become shorter, perhaps
        return warnings

    async with AsyncExitStack() as stack:
        control = _control(options, metrics)
        stack.callback(control.close)
        registry = Registry(control, heard=heard, handoff_failed=pending.failed, metrics=metrics, knowledge=knowledge)
        upstream = await stack.enter_async_context(Upstream())
        outside = Outside(
            directory=directory,
            registry=registry,
            upstream=upstream,
            metrics=metrics,
            pending=pending,
            standing=Standing(options.breaker),
            gate=gate,
            knowledge=knowledge,
            request_log=_request_log(options, stack),
        )
        named = Named(directory, prefills=options.prefills, decodes=options.decodes)
        front = Front(
            outside, options.settings, options.door,
            missing=named.missing, all_metrics=options.all_metrics, on_loopback=is_loopback(options.host),
        )  # fmt: skip
        if options.own_metrics:
            await serve_text(stack, Path(options.own_metrics), front.own_metrics)
        keeper = asyncio.create_task(_keep(outside, named))
        stack.push_async_callback(_cancelled, keeper)
        if options.follows:
            await _caught_up(control, lambda: [*directory.joining(), *named.missing()])
        http = await _listen(stack, _front_runner(front, options), options.host, options.port, shared=bool(options.hub))
        admin_url = ""
        if options.admin_port is not None:
            live = LiveFeed(outside)
            stack.push_async_callback(live.close)
            drains = Drains(outside, workers=options.workers)
            admin = Admin(
                Daemons(directory, registry), upstream, drains, live,
                metrics=front.metrics_page, token=options.admin_token,
            )  # fmt: skip
            admin_url = await _listen(stack, _admin_runner(admin, options), options.admin_host, options.admin_port)
        yield Router(Published(http=http, control=control.endpoint, admin=admin_url), outside, keeper)


def _control(options: Options, metrics: Metrics) -> Control:
    if options.hub:
        return SharedControl(options.hub, options.control, worker=options.worker)
    return ControlSocket(options.control, cluster_key=options.settings.cluster_key, metrics=metrics)


def _request_log(options: Options, stack: AsyncExitStack) -> RequestLog | None:
    if not options.request_log:
        return None
    log = RequestLog(options.request_log)
    stack.callback(log.close)
    return log


def _orphaned(signals: asyncio.Queue[int], life: int) -> None:
    asyncio.get_running_loop().remove_reader(life)
    for _ in range(2):  # nobody would send the second
        signals.put_nowait(signal.SIGTERM)


def _front_runner(front: Front, options: Options) -> web.BaseRunner:
    def malformed(status: int) -> None:
        front.metrics.malformed.labels(code=str(status)).inc()

    listener = Listener(
        front.handle, malformed=malformed, body_bytes_max=options.door.body_bytes_max, idle_s=options.idle_s
    )
    return web.ServerRunner(listener, handle_signals=False, shutdown_timeout=CLOSE_S)


def _admin_runner(admin: Admin, options: Options) -> web.BaseRunner:
    return web.AppRunner(
        admin.app(),
        handler_cancellation=True,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=CLOSE_S,
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        keepalive_timeout=options.idle_s,
    )


async def _caught_up(control: Control, awaited: Callable[[], Sequence[str]]) -> None:
    """It knows the engines that the others know, as far as that can be: clients are theirs meanwhile."""
    with suppress(TimeoutError):
        async with asyncio.timeout(CATCH_UP_S):
            await control.caught_up()
            while awaited():  # noqa: ASYNC110 - each way in which an engine may change would have to tell
                await asyncio.sleep(CATCH_UP_LOOK_S)


async def _listen(stack: AsyncExitStack, runner: web.BaseRunner, host: str, port: int, *, shared: bool = False) -> str:
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port, reuse_port=shared or None).start()
    except OSError as error:
        raise ConfigError(f"can't listen on {authority(host, port)}: {error.strerror or error}") from error
    host, port = runner.addresses[0][:2]
    return f"http://{authority(host, port)}"


async def _keep(outside: Outside, named: Named) -> None:
    directory, standing = outside.directory, outside.standing
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(outside.registry.run())
        tasks.create_task(named.run(outside.upstream))
        turn_at = time.monotonic()
        while True:
            now = time.monotonic()
            if now - turn_at < LATE_S:  # else what daemons have said meanwhile has yet to be read
                for daemon_id in directory.expire(now):
                    outside.knowledge.gone(daemon_id)
            turn_at = now + TICK_S
            outside.work.keep(set(directory.engines()))
            standing.forget(directory.engines(), (ref.daemon_id for ref in directory.daemons()))
            for engine_id, url in directory.due_polls(now):
                tasks.create_task(_poll(outside, engine_id, url))
            outside.gate.tick()
            outside.upstream.drop_idle()
            await asyncio.sleep(TICK_S)


async def _poll(outside: Outside, engine_id: str, url: str) -> None:
    ok = await outside.upstream.healthy(url.rstrip("/") + "/health")
    outside.directory.on_health(engine_id, url, ok, time.monotonic())
    outside.gate.stir()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
