"""A device mover for a torch engine on a real daemon: its pages move on the model of a device."""

from __future__ import annotations

from stream_model import ModelDevice
from torch_engine import TorchEngine, layout_of

from pdx.client import DaemonClient
from pdx.engine.device_mover import DeviceMover


def device_mover_of(engine: TorchEngine, rank: int, client: DaemonClient | None) -> DeviceMover:
    """Gathers and scatters at once, as this engine computes; what is between staging and arena takes its time."""
    layout = layout_of(engine.shards)
    caches = [pages.reshape(-1).data for pages in engine.pages(rank).pages]
    device = ModelDevice(caches, layout, eager=True)
    device.checks_order = False  # the engine's own accesses are not the device's
    shard = layout.shard_of_rank(rank)
    mover = DeviceMover(device, layout, client, shard=shard, staging_bytes=4 * layout.page_bytes)
    device.starved = {2}  # copies out, until the other thread waits for them
    return mover
