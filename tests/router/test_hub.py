"""What the process says that workers of one router share."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import zmq
import zmq.asyncio
from engine_fakes import KEY, FakeDaemon, daemon_ref, until, within

from pdx.curve import lock
from pdx.router.engines.control import ControlSocket, SharedControl
from pdx.router.metrics import Metrics
from pdx.router.workers.hub import HEARD_S, Hub, Places
from pdx.wire import MAGIC, ROUTER, WIRE_VERSION, Announce, decoder_of

decode = decoder_of(ROUTER)
Announced = list[tuple[str, bool]]  # whose, and whether it is leaving


@asynccontextmanager
async def running() -> AsyncIterator[tuple[ControlSocket, Places, Metrics]]:
    with tempfile.TemporaryDirectory() as folder:
        places, metrics = Places(Path(folder)), Metrics()
        control = ControlSocket("tcp://127.0.0.1:0", cluster_key=KEY, metrics=metrics)
        hub = Hub(control, places, metrics)
        task = asyncio.create_task(hub.run())
        try:
            yield control, places, metrics
        finally:
            task.cancel()
            await asyncio.wait({task})
            hub.close()
            control.close()


@asynccontextmanager
async def worker(places: Places) -> AsyncIterator[tuple[SharedControl, Announced]]:
    """The first of them, and all announcements that it has heard."""
    control, heard = SharedControl(places.control, "", worker=0), Announced()

    async def hear() -> None:
        while True:
            message = decode((await control.receive())[1])
            assert isinstance(message, Announce)
            heard.append((message.daemon.daemon_id, message.leaving))

    tasks = [asyncio.create_task(control.run()), asyncio.create_task(hear())]
    try:
        yield control, heard
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        control.close()


@within(20)
async def test_a_new_worker_hears_of_those_who_are_there_and_of_nobody_else() -> None:
    began = time.monotonic()
    async with running() as (control, places, _):
        stays, leaves = (FakeDaemon(daemon_ref(name), []) for name in ("stays", "leaves"))
        async with stays.announcing(control.endpoint, every_s=60), leaves.announcing(control.endpoint, every_s=60):
            async with worker(places) as (_, heard):
                await until(lambda: {("stays", False), ("leaves", False)} <= set(heard), "both have said so")
                await leaves.announce(leaving=True)
                await until(lambda: ("leaves", True) in heard, "one leaves")
            async with worker(places) as (follower, heard):
                await follower.caught_up()
                assert set(heard) == {("stays", False)}
    assert time.monotonic() - began >= HEARD_S, "a hub can't say sooner that it has heard of all"


@within(20)
async def test_the_hub_tells_a_daemon_of_another_version_so() -> None:
    """Workers never see its frames: the hub can't read them."""
    async with running() as (control, _, metrics):
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as daemon:
            daemon.linger = 0
            lock(daemon, KEY, server=False)
            daemon.connect(control.endpoint)
            await daemon.send(MAGIC + bytes([WIRE_VERSION + 1]) + b"\x80")
            assert (await daemon.recv())[:4] == MAGIC + bytes([WIRE_VERSION])
    assert metrics.registry.get_sample_value("pdx_router_bad_frames_total") == 1
