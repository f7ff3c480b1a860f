"""One handoff and its names, for tests of either half."""

from __future__ import annotations

from wire_samples import PAGES

from pdx.handoff import actions as do
from pdx.handoff.handle import TransferHandle
from pdx.handoff.receiver import Receiver
from pdx.handoff.sender import Sender
from pdx.layout import Place
from pdx.wire import Budgets, DaemonRef, Grant, Reserve

LAYERS = 2
ID = b"i" * 16
PREFILL = DaemonRef(daemon_id="p", incarnation=1, control="tcp://127.0.0.1:1", lanes=[])
DECODE = DaemonRef(daemon_id="d", incarnation=2, control="tcp://127.0.0.1:2", lanes=[])
HANDLE = TransferHandle(
    handoff_id=ID, attempt=1, prefill_engine="P", decode_engine="D", prefill_daemon=PREFILL, decode_daemon=DECODE,
    budgets=Budgets(grant_s=1, slab_s=2, total_s=10, claim_s=3), issued_unix_s=0.0,
)  # fmt: skip
PLACES = [Place(slot_offset=4096 * n, slot_blocks=1, position=0, header_offset=0, generation=1) for n in range(3)]
IDS = {"handoff_id": ID, "attempt": 1, "lease_epoch": 0, "incarnation": 1}
RESERVE = Reserve(
    **IDS, handle="h", namespace=b"n", layout_id="l", pages=PAGES, block_hashes=[b"a", b"b"], tail_hash=b"t", lane="tcp"
)
GRANT = Grant(**IDS, has=[], wanted=[0, 1, 2], places=PLACES, window=1)


def kinds(actions: list[do.Action]) -> list[str]:
    """Names of the actions; messages by their own name."""
    return [type(a.message).__name__ if isinstance(a, do.ToPeer | do.ToEngine) else type(a).__name__ for a in actions]


def make_sender(fresh: set[int] | None = None) -> Sender:
    sender = Sender(HANDLE, request_id="r", blocks=3, layers=LAYERS, page_bytes=64, incarnation=1, now=0.0)
    sender.claimed(PLACES, frozenset({0, 1, 2} if fresh is None else fresh), RESERVE, now=0.0)
    return sender


def make_receiver(wanted: tuple[int, ...] = (0, 1, 2)) -> Receiver:
    receiver = Receiver(HANDLE, blocks=3, layers=LAYERS, lease_epoch=4, incarnation=2, now=0.0)
    receiver.claimed(wanted, GRANT, windowed=True, now=0.0)
    return receiver
