"""The naive variant: nothing leaves before the last page is filled, then everything does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.naive.late import SIGN, LateSender, after_prefill
from pdx.handoff.actions import Action, Put, SendCommit
from pdx.handoff.handle import TransferHandle
from pdx.layout import Place
from pdx.wire import Alive, Budgets, DaemonRef

BLOCKS, LAYERS = 2, 3
Page = tuple[int, int]  # layer, block
PREFILL = DaemonRef(daemon_id="p", incarnation=1, control="tcp://127.0.0.1:1", lanes=[])
DECODE = DaemonRef(daemon_id="d", incarnation=2, control="tcp://127.0.0.1:2", lanes=[])
HANDLE = TransferHandle(
    handoff_id=b"i" * 16, attempt=1, prefill_engine="P", decode_engine="D", prefill_daemon=PREFILL,
    decode_daemon=DECODE, budgets=Budgets(grant_s=1, slab_s=2, total_s=10, claim_s=3), issued_unix_s=0.0,
)  # fmt: skip
PLACES = [Place(slot_offset=4096 * n, slot_blocks=1, position=0, header_offset=0, generation=1) for n in range(BLOCKS)]
RESERVE = Alive(handoff_id=b"i" * 16, attempt=1, lease_epoch=0, incarnation=1)  # any message will do


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(LateSender, "sign", tmp_path / SIGN)
    return tmp_path


def opened() -> LateSender:
    sender = LateSender(HANDLE, request_id="r", blocks=BLOCKS, layers=LAYERS, page_bytes=64, incarnation=1, now=0.0)
    sender.claimed(PLACES, frozenset(range(BLOCKS)), RESERVE, now=0.0)
    return sender


def grant(sender: LateSender) -> list[Action]:
    return sender.granted(has=[], wanted=range(BLOCKS), lease_epoch=1, now=0.1)


def fill(sender: LateSender) -> list[list[Page]]:
    """What leaves when each layer is filled."""
    return [puts(sender.filled(layer, range(BLOCKS), now=0.2)) for layer in range(LAYERS)]


def puts(actions: list[Action]) -> list[Page]:
    return sorted((put.layer, block) for put in actions if isinstance(put, Put) for block in put.blocks)


def pages_of(layers: range) -> list[Page]:
    return [(layer, block) for layer in layers for block in range(BLOCKS)]


ALL_LATE: list[list[Page]] = [[], [], pages_of(range(LAYERS))]


def test_without_the_sign_every_layer_leaves_when_it_is_filled(run_dir: Path) -> None:
    sender = opened()
    grant(sender)
    assert fill(sender) == [pages_of(range(layer, layer + 1)) for layer in range(LAYERS)]


def test_with_the_sign_all_leave_after_the_last(run_dir: Path) -> None:
    with after_prefill(run_dir):
        sender = opened()
    grant(sender)
    assert fill(sender) == ALL_LATE
    ends = [sender.put_ended(ok=True, reason="", now=0.3) for _ in range(LAYERS)]
    assert [type(action) for action in ends[-1]] == [SendCommit]


def test_a_grant_in_mid_prompt_or_after_it_sends_no_page_twice(run_dir: Path) -> None:
    with after_prefill(run_dir):
        early, late = opened(), opened()
    early.filled(0, [0], now=0.1)
    assert grant(early) == []
    assert fill(early) == ALL_LATE
    assert fill(late) == [[], [], []]
    assert puts(grant(late)) == ALL_LATE[-1]


def test_the_sign_is_taken_away(run_dir: Path) -> None:
    with after_prefill(run_dir):
        assert (run_dir / SIGN).exists()
    assert not (run_dir / SIGN).exists()
