"""The transfer handle: a signed, single-use token that lets two daemons move one request's KV.

The router mints it, the client never sees it, and a daemon accepts it only if the cluster key signed it, it names
that daemon in its present incarnation, it is fresh, and it was not used before (see `SeenHandles`).
"""

from __future__ import annotations

import base64
import binascii
import hmac

import msgspec

from pdx.errors import HandleError
from pdx.wire import Budgets, DaemonRef

HANDOFF_ID_BYTES = 16
HANDLE_CHARS_MAX = 8192
_MAC_BYTES = 32
# Hosts' wall clocks may differ by this much; freshness is the only use pdx makes of wall time.
CLOCK_SKEW_S = 60.0


class TransferHandle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both daemons must know of a handoff before its first message."""

    handoff_id: bytes
    attempt: int
    prefill_engine: str
    decode_engine: str
    prefill_daemon: DaemonRef
    decode_daemon: DaemonRef
    budgets: Budgets
    issued_unix_s: float
    traceparent: str = ""  # the request's place in its client's trace (W3C), for whoever looks at the daemons' traces

    @property
    def expires_unix_s(self) -> float:
        return self.issued_unix_s + self.budgets.total_s + self.budgets.claim_s + CLOCK_SKEW_S


def mint(handle: TransferHandle, cluster_key: bytes) -> str:
    """The handle as text for kv_transfer_params["pdx_handle"]."""
    body = msgspec.msgpack.encode(handle)
    return base64.urlsafe_b64encode(_mac(body, cluster_key) + body).decode("ascii")


def verify(text: str, cluster_key: bytes, *, now_unix_s: float) -> TransferHandle:
    """Decodes a handle. Raises HandleError unless it is well formed, signed by this key and fresh."""
    mac, body = _split(text)
    if not hmac.compare_digest(mac, _mac(body, cluster_key)):
        raise HandleError("handle is not signed by this cluster's key")
    handle = _decoded(body)
    if now_unix_s > handle.expires_unix_s:
        raise HandleError("handle has expired")
    if handle.issued_unix_s > now_unix_s + CLOCK_SKEW_S:
        raise HandleError("handle comes from the future: check the hosts' clocks")
    return handle


def peek(text: str) -> TransferHandle:
    """Decodes a handle without verifying it, for engines: they have no key, and their daemon verifies.

    Raises HandleError unless it is well formed.
    """
    return _decoded(_split(text)[1])


class SeenHandles:
    """Which (handoff id, attempt, side) were used here. Remembered until the handle would have expired anyway."""

    def __init__(self) -> None:
        self._expiry: dict[tuple[bytes, int, str], float] = {}

    def use(self, handle: TransferHandle, side: str, *, now_unix_s: float) -> None:
        """Marks one use. Raises HandleError on the second."""
        key = (handle.handoff_id, handle.attempt, side)
        if key in self._expiry:
            raise HandleError("handle was used before")
        self._expiry[key] = handle.expires_unix_s
        if len(self._expiry) % 256 == 0:
            self._expiry = {k: t for k, t in self._expiry.items() if t >= now_unix_s}


def _split(text: str) -> tuple[bytes, bytes]:
    if len(text) > HANDLE_CHARS_MAX:
        raise HandleError("handle is too long")
    try:
        raw = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError) as error:
        raise HandleError("handle is not base64") from error
    if base64.urlsafe_b64encode(raw) != text.encode("ascii"):
        raise HandleError("handle is not canonical base64")
    return raw[:_MAC_BYTES], raw[_MAC_BYTES:]


def _decoded(body: bytes) -> TransferHandle:
    try:
        handle = msgspec.msgpack.decode(body, type=TransferHandle)
    except (msgspec.MsgspecError, ValueError) as error:
        raise HandleError(f"handle is malformed: {error}") from error
    if len(handle.handoff_id) != HANDOFF_ID_BYTES:
        raise HandleError("handoff id has the wrong length")
    return handle


def _mac(body: bytes, cluster_key: bytes) -> bytes:
    return hmac.digest(cluster_key, b"pdx-handle-1" + body, "sha256")
