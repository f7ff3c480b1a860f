"""Device movers for torch engines on real daemons: their pages move on the model of a device, or on a GPU."""

from __future__ import annotations

from pathlib import Path

from stream_model import ModelDevice
from torch_engine import TorchEngine, layout_of

from pdx.client import DaemonClient
from pdx.engine.device_mover import DeviceMover


def device_mover_of(engine: TorchEngine, rank: int, client: DaemonClient | None) -> DeviceMover:
    """Gathers and scatters at once, as this engine computes; what is between staging and arena takes its time."""
    layout = layout_of(engine.shards)
    caches = [pages.reshape(-1).data for pages in engine.pages(rank)]
    device = ModelDevice(caches, layout, eager=True)
    device.checks_order = False  # the engine's own accesses are not the device's
    shard = layout.shard_of_rank(rank)
    mover = DeviceMover(device, layout, client, shard=shard, staging_bytes=4 * layout.page_bytes)
    device.starved = {2}  # copies out, until the other thread waits for them
    return mover


def gpu_mover_of(
    engine: TorchEngine, rank: int, client: DaemonClient | None, *, folder: Path, straight: bool
) -> DeviceMover:
    """The real thing: CUDA's streams, our kernels, the arena pinned."""
    from pdx.engine.device import CudaDevice

    layout = layout_of(engine.shards)
    device, shard = CudaDevice(engine.byte_views(rank), folder), layout.shard_of_rank(rank)
    return DeviceMover(
        device, layout, client, shard=shard, staging_bytes=4 * layout.page_bytes, loads_straight=straight
    )
