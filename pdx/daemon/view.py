"""A daemon at a glance, for the live page: gauges and counts that are there already. Owns nothing, changes nothing."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING

from pdx.daemon.lanes import LOCAL
from pdx.daemon.receiving import Incoming
from pdx.daemon.sending import Outgoing
from pdx.verbs import HANDOFFS_SHOWN, DaemonView, DiskView, HandoffView

if TYPE_CHECKING:
    from pdx.daemon.handoffs import Handoffs
    from pdx.daemon.service import Service


def view(service: Service, now: float) -> DaemonView:
    """Takes time linear in extents and in handoffs under way, not in blocks."""
    store, handoffs, counters = service.store, service.handoffs, service.counters
    sends, receives = handoffs.halves
    halves = chain((_sending(half, now) for half in sends), (_receiving(half, now) for half in receives))
    promoted = counters["blocks_promoted"]
    lanes = [offer.scheme for offer in service.me.lanes]  # those that nothing has taken too: rates begin at 0
    return DaemonView(
        arena_bytes=len(store.arena.memory),
        leased_bytes=store.extents.used_bytes - store.extents.idle_bytes,
        cached_bytes=store.extents.idle_bytes,
        cached_blocks=len(store.index),
        pinned_bytes=handoffs.pinned_bytes,
        waiting=handoffs.reservations_waiting,
        handoffs_under_way=len(sends) + len(receives),
        handoffs=list(islice(halves, HANDOFFS_SHOWN)),
        disk=_disk(handoffs),
        lookup_blocks=counters["lookup_blocks"],
        arena_hit_blocks=max(0, counters["lookup_hit_blocks"] - promoted),
        disk_hit_blocks=promoted,
        evicted_blocks=store.evicted_blocks,
        handoffs_ok=counters["sends_settled"] + counters["receives_settled"],
        handoffs_failed=counters["sends_failed"] + counters["receives_failed"],
        sent_bytes=counters["bytes_put"],
        landed_pages=counters["pages_landed"],
        handoffs_by_lane={lane: counters[f"handoffs_by_{lane}"] for lane in (LOCAL.scheme, *lanes)},
        lanes_lost={lane: counters[f"lanes_lost_{lane}"] for lane in lanes},
        commit_mismatches=counters["commit_mismatches"],
        blocks_spoilt=counters["blocks_spoilt"],
        loads_failed=counters["loads_failed"],
        leases_expired=counters["leases_expired"],
        bad_frames=counters["bad_frames"],
    )


def _sending(half: Outgoing, now: float) -> HandoffView:
    sender = half.sender
    return HandoffView(
        handoff=half.key[0].hex(),
        side="send",
        state=sender.state.value,
        peer=sender.handle.decode_daemon.daemon_id,
        blocks=sender.blocks,
        pages=sender.pages_put,
        pages_wanted=len(sender.wanted) * half.pages.layers,
        age_s=now - sender.started_at,
        is_spare=half.engine is None,
    )


def _receiving(half: Incoming, now: float) -> HandoffView:
    receiver = half.receiver
    return HandoffView(
        handoff=half.key[0].hex(),
        side="receive",
        state=receiver.state.value,
        peer=receiver.handle.prefill_daemon.daemon_id,
        blocks=receiver.blocks,
        pages=receiver.pages_landed,
        pages_wanted=len(receiver.wanted) * half.reserve.pages.layers,
        age_s=now - receiver.started_at,
        is_spare=half.reserve.spare,
    )


def _disk(handoffs: Handoffs) -> DiskView | None:
    disk = handoffs.disk()
    if disk is None:
        return None
    return DiskView(
        state=disk["state"],
        blocks=disk["blocks"],
        used_bytes=disk["used_bytes"],
        cap_bytes=disk["cap_bytes"],
        waiting_writes=disk["waiting_writes"],
        loaded_blocks=disk["loaded"],
        written_blocks=disk["written"],
        io_errors=disk["io_errors"],
        lost_blocks=disk["lost_blocks"],
    )
