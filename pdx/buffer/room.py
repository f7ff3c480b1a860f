"""Who goes when a claim needs room. Decides by a policy's order and by extents; evicts nothing.

An arena has hundreds of thousands of slots, and a claim is often of one block: nothing here looks further than it must.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pdx.buffer.extents import Extent, Extents, is_clearable
from pdx.buffer.quota import Quotas
from pdx.buffer.slots import Slot
from pdx.errors import Refused
from pdx.layout import PageLayout


def check_possible(pages: PageLayout, blocks: int, allowed: int, quotas: Quotas, tenant: bytes) -> None:
    """Raises Refused if this tenant never gets so many blocks at once, of which one prompt may have `allowed`."""
    if blocks > allowed:
        raise Refused(
            f"a prompt of {blocks} blocks of {pages.block_bytes} bytes never fits: one handoff may take {allowed} "
            "of this arena; raise arena or handoff_share"
        )
    if quotas.never_fits(tenant, blocks * pages.unit_bytes):
        raise Refused(
            f"a prompt of {blocks} blocks of {pages.block_bytes} bytes never fits: one tenant may take "
            f"{quotas.limit_bytes(tenant)} bytes of this arena; raise arena or tenant_share"
        )


def first_to_go(
    ordered: Iterable[Slot], extents: Extents, slots: Mapping[int, Slot], layout: PageLayout, blocks: int
) -> list[Slot]:
    """The first idle ones of these that make room for so many blocks. One of another layout goes with its whole extent.

    `blocks` is at most what is idle in this layout's extents and what the clearable ones of others would hold.
    """
    going: list[Slot] = []
    cleared: set[Extent] = set()
    for slot in ordered if blocks > 0 else ():
        extent = slot.run.extent
        if not slot.idle or extent in cleared:
            continue  # being copied, or gone already, with its extent
        if slot.layout == layout:
            going.append(slot)
            blocks -= slot.blocks
        elif is_clearable(extent):
            cleared.add(extent)
            going += [slots[offset] for offset in extents.offsets(slot.run) if offset in slots]
            blocks -= extents.units(layout)
        if blocks <= 0:
            break
    return going


def own_to_go(own: Iterable[Slot], short_bytes: int) -> tuple[list[Slot], int, int]:
    """Of a tenant's own, the first idle ones that are so many bytes; how many they are; and with those only copied.

    Looks no further, so that a tenant's cache may be large.
    """
    going: list[Slot] = []
    idle_bytes = unused_bytes = 0
    for slot in own if short_bytes > 0 else ():
        unused_bytes += slot.size_bytes
        if slot.idle:  # who copies the others is done with them soon
            going.append(slot)
            idle_bytes += slot.size_bytes
        if idle_bytes >= short_bytes:
            break
    return going, idle_bytes, unused_bytes
