"""A running router: binds its sockets, keeps the directory true, and ends cleanly. Only wires the other parts."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec
from aiohttp import web

from pdx.errors import ConfigError
from pdx.router.admin import Admin
from pdx.router.app import HEADER_BYTES_MAX, Front
from pdx.router.conductor import Outside
from pdx.router.daemons import Daemons
from pdx.router.directory import Directory
from pdx.router.journey import Settings
from pdx.router.metrics import Metrics
from pdx.router.pending import Pending
from pdx.router.registry import Registry
from pdx.router.upstream import Upstream
from pdx.wire import Announce

TICK_S = 0.1  # resolution of health polls and of a silent daemon's expiry
DRAIN_S = 5.0  # requests under way at shutdown get this long

_log = logging.getLogger(__name__)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a router listens and for how long it serves one request."""

    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8000
    control: str = "tcp://127.0.0.1:5700"
    request_timeout_s: float = 600.0
    publish: str = ""
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # None: no admin port
    admin_token: str = ""


class Published(msgspec.Struct, frozen=True):
    """Where a router listens: what --publish writes."""

    http: str
    control: str
    admin: str = ""


async def serve(options: Options) -> None:
    """Runs until SIGINT or SIGTERM. Raises ConfigError if it can't listen."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with running(options) as (published, keeper):
        _log.info("listening on %s, control on %s", published.http, published.control)
        if published.admin:
            _log.info("admin port at %s, %s a token", published.admin, "with" if options.admin_token else "without")
        if options.publish:
            publish(Path(options.publish), published)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, keeper}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if keeper.done():
            keeper.result()
    _log.info("stopped")


@asynccontextmanager
async def running(options: Options) -> AsyncIterator[tuple[Published, asyncio.Task[None]]]:
    """A listening router, and the task whose end would be its failure. Leaving the block ends it within DRAIN_S."""
    directory, metrics, pending = Directory(), Metrics(), Pending()

    def heard(announce: Announce) -> list[str]:
        return directory.on_announce(announce, time.monotonic())

    async with AsyncExitStack() as stack:
        registry = Registry(
            options.control,
            cluster_key=options.settings.cluster_key,
            heard=heard,
            handoff_failed=pending.failed,
            metrics=metrics,
        )
        stack.callback(registry.close)
        upstream = await stack.enter_async_context(Upstream())
        outside = Outside(directory=directory, registry=registry, upstream=upstream, metrics=metrics, pending=pending)
        front = Front(outside, options.settings, request_timeout_s=options.request_timeout_s)
        http = await _listen(stack, front.app(), options.host, options.port)
        admin_url = ""
        if options.admin_port is not None:
            admin = Admin(Daemons(directory, registry), upstream, token=options.admin_token)
            admin_url = await _listen(stack, admin.app(), options.admin_host, options.admin_port)
        keeper = asyncio.create_task(_keep(registry, directory, upstream))
        stack.push_async_callback(_cancelled, keeper)
        yield Published(http=http, control=registry.endpoint, admin=admin_url), keeper


def publish(path: Path, published: Published) -> None:
    """Writes it whole or not at all: readers wait for the file to appear."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(msgspec.json.encode(published))
    temporary.replace(path)


async def _listen(stack: AsyncExitStack, app: web.Application, host: str, port: int) -> str:
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves ends its request's task, and with it the upstream calls
        access_log=None,
        handle_signals=False,
        shutdown_timeout=DRAIN_S,
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror or error}") from error
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _keep(registry: Registry, directory: Directory, upstream: Upstream) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(registry.run())
        while True:
            now = time.monotonic()
            directory.expire(now)
            for engine_id, url in directory.due_polls(now):
                tasks.create_task(_poll(directory, upstream, engine_id, url))
            await asyncio.sleep(TICK_S)


async def _poll(directory: Directory, upstream: Upstream, engine_id: str, url: str) -> None:
    ok = await upstream.healthy(url.rstrip("/") + "/health")
    directory.on_health(engine_id, ok, time.monotonic())


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
