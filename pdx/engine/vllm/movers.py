"""Which way an engine's pages move: where vLLM keeps its KV cache decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pdx.client import DaemonClient
from pdx.engine.device_mover import DeviceMover
from pdx.engine.host_mover import HostMover
from pdx.engine.mover import Mover
from pdx.engine.streams import Device
from pdx.errors import Refused
from pdx.layout import PageLayout

if TYPE_CHECKING:
    import torch


def mover_of(
    views: Sequence[torch.Tensor], layout: PageLayout, client: DaemonClient | None, *, shard: int, folder: Path
) -> Mover:
    """`views`: each layer's (blocks, page bytes). `folder` keeps what is compiled for a device and measured of it.

    Raises Refused for memory that nothing of ours can copy, DeviceLost.
    """
    kinds = {view.device.type for view in views}
    if kinds == {"cpu"}:
        return HostMover([view.numpy() for view in views], layout, shard=shard)
    if kinds != {"cuda"}:
        raise Refused(f"KV cache in {' and '.join(sorted(kinds))} memory is not supported: only the CPU's and NVIDIA's")
    # Only where there is one: it needs NVIDIA's packages.
    from pdx.engine.device import CudaDevice
    from pdx.engine.ways import rates_of

    device = CudaDevice(views, folder)
    straight = rates_of(device, folder).loads_straight
    return DeviceMover(cast(Device, device), layout, client, shard=shard, loads_straight=straight)
