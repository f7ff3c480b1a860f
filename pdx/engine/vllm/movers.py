"""Which way an engine's pages move: where vLLM keeps its KV cache decides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pdx.client import DaemonClient
from pdx.engine.device_mover import DeviceMover
from pdx.engine.host_mover import HostMover
from pdx.engine.mover import Mover
from pdx.engine.streams import Device
from pdx.engine.vllm.caches import Caches
from pdx.layout import PageLayout

if TYPE_CHECKING:
    import torch


def mover_of(
    kv_caches: Mapping[str, torch.Tensor],
    views: Caches,
    layout: PageLayout,
    client: DaemonClient | None,
    *,
    shard: int,
    folder: Path,
) -> Mover:
    """`views` are of `kv_caches`, all in one memory. `folder` keeps what is compiled for a device."""
    (kind,) = {cache.device.type for cache in kv_caches.values()}
    if kind == "cpu":
        return HostMover(views.pages, layout, shard=shard)
    # Only where there is one: it needs NVIDIA's packages.
    from pdx.engine.device import CudaDevice  # type: ignore[import-not-found,unused-ignore]

    return DeviceMover(cast(Device, CudaDevice(views.pages, folder)), layout, client, shard=shard)
