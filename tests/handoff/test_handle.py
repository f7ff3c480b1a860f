"""Handles: signed, fresh, single-use."""

from __future__ import annotations

import math

import msgspec
import pytest
from wire_samples import DAEMON, ID

from pdx.errors import HandleError
from pdx.handoff.handle import HANDLE_CHARS_MAX, SeenHandles, TransferHandle, mint, peek, verify
from pdx.wire import Budgets

KEY = b"k" * 32
HANDLE = TransferHandle(
    handoff_id=ID, attempt=1, prefill_engine="P", decode_engine="D", prefill_daemon=DAEMON, decode_daemon=DAEMON,
    budgets=Budgets(), issued_unix_s=1000.0,
)  # fmt: skip


def test_round_trip() -> None:
    assert verify(mint(HANDLE, KEY), KEY, now_unix_s=1001.0) == HANDLE


def test_every_flipped_character_is_refused() -> None:
    text = mint(HANDLE, KEY)
    for at in range(len(text)):
        forged = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        with pytest.raises(HandleError):
            verify(forged, KEY, now_unix_s=1001.0)


@pytest.mark.parametrize("text", ["", "é", "AAAA", "=" * 40, "A" * (HANDLE_CHARS_MAX + 1)])
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(HandleError):
        verify(text, KEY, now_unix_s=1001.0)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 1e300])
@pytest.mark.parametrize("budget", ["grant_s", "slab_s", "total_s", "claim_s"])
def test_a_budget_is_a_time_also_before_anybody_has_verified_it(budget: str, seconds: float) -> None:
    """Whoever waited until NaN waited for ever."""
    budgets = msgspec.structs.replace(Budgets(), **{budget: seconds})
    with pytest.raises(HandleError, match=budget):
        peek(mint(msgspec.structs.replace(HANDLE, budgets=budgets), b"nobody's" * 4))


def test_another_cluster_is_refused() -> None:
    with pytest.raises(HandleError, match="not signed"):
        verify(mint(HANDLE, b"other" * 8), KEY, now_unix_s=1001.0)


def test_expiry_and_the_future() -> None:
    text = mint(HANDLE, KEY)
    with pytest.raises(HandleError, match="expired"):
        verify(text, KEY, now_unix_s=HANDLE.expires_unix_s + 1)
    with pytest.raises(HandleError, match="clocks"):
        verify(text, KEY, now_unix_s=900.0)


def test_single_use_per_side() -> None:
    seen = SeenHandles()
    seen.use(HANDLE, "send", now_unix_s=1000.0)
    seen.use(HANDLE, "receive", now_unix_s=1000.0)
    seen.use(msgspec.structs.replace(HANDLE, attempt=2), "send", now_unix_s=1000.0)
    with pytest.raises(HandleError, match="used before"):
        seen.use(HANDLE, "send", now_unix_s=1000.0)
