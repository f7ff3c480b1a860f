"""The receiving half of a handoff, driven by pure events."""

from __future__ import annotations

import pytest
from halves import GRANT, HANDLE, IDS, LAYERS, kinds, make_receiver

from pdx.handoff import actions as do
from pdx.handoff.receiver import Receiver
from pdx.handoff.states import Receiving
from pdx.wire import REASON_CHARS_MAX, Cancel, Commit, Fail, LoadEnded, Refuse


def land_all(receiver: Receiver) -> None:
    for layer in range(LAYERS):
        receiver.landed(layer, [0, 1, 2], now=0.1)


COMMIT = Commit(**IDS, pages=6, checksum=77)


def test_no_page_is_awaited_twice_or_after_the_end() -> None:
    receiver = make_receiver((0, 2))
    assert receiver.awaits(0, [0, 2])
    receiver.landed(0, [0], now=0.1)
    assert not receiver.awaits(0, [2, 0]), "a late twin would overwrite a checksum"
    assert receiver.awaits(1, [0])
    assert not receiver.awaits(0, [1]), "not wanted"
    assert not any(receiver.awaits(layer, [0]) for layer in (-1, LAYERS))
    receiver.fail("x", tell_peer=False)
    assert not receiver.awaits(0, [2])


def test_it_is_in_a_hurry_only_while_something_follows_from_the_next_page() -> None:
    receiver = Receiver(HANDLE, blocks=3, layers=4, lease_epoch=4, incarnation=2, now=0.0)
    assert not receiver.hurried, "nothing comes before the grant"
    receiver.claimed([0, 1, 2], GRANT, windowed=True, now=0.0)
    assert receiver.hurried, "an early question waits for the first page"
    receiver.landed(0, [0, 1, 2], now=0.1)
    assert not receiver.hurried
    receiver.landed(1, [0, 1, 2], now=0.1)
    receiver.landed(2, [0, 1], now=0.1)
    assert not receiver.hurried
    assert receiver.engine_opened()
    assert receiver.hurried, "an engine reads what has landed"
    receiver.engine_let_go(ok=True, reason="")
    assert not receiver.hurried
    receiver.landed(2, [2, 2], now=0.1)
    assert receiver.hurried, "the last pages"
    assert receiver.pages_landed == 9
    receiver.landed(3, [0, 1, 2], now=0.1)
    receiver.commit(Commit(**IDS, pages=12, checksum=77))
    receiver.checked(ok=True, now=0.2)
    assert receiver.hurried, "the end of its window"
    receiver.window_closed()
    assert not receiver.hurried


def test_it_is_in_a_hurry_once_commit_is_here() -> None:
    receiver = Receiver(HANDLE, blocks=3, layers=4, lease_epoch=4, incarnation=2, now=0.0)
    receiver.claimed([0, 1, 2], GRANT, windowed=True, now=0.0)
    receiver.landed(0, [0, 1, 2], now=0.1)
    receiver.commit(Commit(**IDS, pages=12, checksum=77))
    assert receiver.hurried


def test_a_handoff_has_begun_with_its_first_page_or_when_none_is_to_come() -> None:
    receiver = make_receiver()
    receiver.landed(0, [7], now=0.1)
    assert not receiver.begun
    receiver.landed(1, [2], now=0.1)
    assert receiver.begun
    assert make_receiver(wanted=()).begun


def test_watermarks_count_leading_layers_only() -> None:
    receiver = make_receiver()
    assert receiver.landed(1, [0], now=0.1) == [(0, 0)]
    assert receiver.landed(0, [0, 1], now=0.1) == [(0, 2), (1, 1)]


def test_each_shard_has_a_watermark_of_its_own() -> None:
    receiver = Receiver(HANDLE, blocks=1, layers=6, shards=2, lease_epoch=4, incarnation=2, now=0.0)
    receiver.claimed([0], GRANT, windowed=True, now=0.0)
    raised = [receiver.landed(layer, [0], now=0.1)[0][1] for layer in (3, 0, 5, 4, 1, 2)]
    assert raised == [1, 1, 1, 3, 2, 3]


@pytest.mark.parametrize("commit_first", [True, False])
def test_commit_and_pages_in_any_order(commit_first: bool) -> None:
    receiver = make_receiver()
    actions = receiver.commit(COMMIT) if commit_first else []
    land_all(receiver)
    actions += receiver.check() if commit_first else receiver.commit(COMMIT)
    assert actions == [do.CheckCommit(77)]
    assert kinds(receiver.checked(ok=True, now=0.2)) == ["Publish", "Committed", "CloseWindow"]
    assert receiver.state is Receiving.LANDED


def test_wrong_checksum_is_a_failure_not_a_success() -> None:
    receiver = make_receiver()
    land_all(receiver)
    receiver.commit(COMMIT)
    assert kinds(receiver.checked(ok=False, now=0.2)) == ["Cancel", "Abandon", "CloseWindow"]
    assert receiver.state is Receiving.FAILING


def test_commit_of_another_count_fails() -> None:
    receiver = make_receiver(wanted=(2,))
    receiver.commit(COMMIT)
    assert "6 pages where 2 were wanted" in receiver.reason


def test_the_end_needs_window_and_engine_both_quiet() -> None:
    receiver = make_receiver()
    assert receiver.engine_opened()
    assert not receiver.engine_opened(), "one load per handoff"
    receiver.fail("prefill died", tell_peer=False)
    assert receiver.window_closed() == []
    assert receiver.engine_let_go(ok=False, reason="") == [do.Ended("prefill died")]


def test_failing_tells_an_engine_that_reads_along() -> None:
    receiver = make_receiver()
    receiver.engine_opened()
    actions = receiver.failed_by_peer(Fail(**IDS, reason="engine died"))
    assert kinds(actions) == ["Abandon", "CloseWindow", "LoadEnded", "RevokeEngine"]
    assert isinstance(actions[2].message, LoadEnded)


def test_engine_may_finish_before_commit() -> None:
    receiver = make_receiver()
    receiver.engine_opened()
    land_all(receiver)
    assert receiver.engine_let_go(ok=True, reason="") == []
    receiver.commit(COMMIT)
    receiver.checked(ok=True, now=0.2)
    assert receiver.window_closed() == [do.Ended("")]


def test_decode_request_aborted_while_pages_land_cancels_the_sender() -> None:
    receiver = make_receiver()
    receiver.engine_opened()
    assert kinds(receiver.engine_let_go(ok=False, reason="aborted")) == ["Cancel", "Abandon", "CloseWindow"]


def test_nobody_claims_the_landed_pages() -> None:
    """The router died between prefill's answer and decode's request: the claim budget frees the tail."""
    receiver = make_receiver()
    land_all(receiver)
    receiver.commit(COMMIT)
    receiver.checked(ok=True, now=1.0)
    receiver.window_closed()
    assert receiver.tick(now=3.9) == []
    assert receiver.tick(now=4.1) == [do.Ended("")]
    assert not receiver.engine_opened()


def test_what_nobody_waits_for_ends_when_it_has_landed_and_its_window_is_closed() -> None:
    receiver = Receiver(HANDLE, blocks=3, layers=LAYERS, lease_epoch=4, incarnation=2, now=0.0, spare=True)
    receiver.claimed((0, 1, 2), GRANT, windowed=True, now=0.0)
    assert not receiver.engine_opened(), "no engine has a right to it"
    land_all(receiver)
    receiver.commit(COMMIT)
    assert kinds(receiver.checked(ok=True, now=1.0)) == ["Publish", "Committed", "CloseWindow"]
    assert receiver.window_closed() == [do.Ended("")]


def test_the_sender_s_end_after_landed_changes_nothing() -> None:
    receiver = make_receiver()
    land_all(receiver)
    receiver.commit(COMMIT)
    receiver.checked(ok=True, now=1.0)
    assert receiver.failed_by_peer(Fail(**IDS, reason="late")) == []
    assert receiver.peer_lost() == []
    assert receiver.engine_opened(), "every page is here and checked"
    assert receiver.engine_let_go(ok=True, reason="") == []
    assert receiver.window_closed() == [do.Ended("")]


def test_a_sender_that_is_lost_before_fails_what_is_under_way() -> None:
    receiver = make_receiver()
    land_all(receiver)
    assert kinds(receiver.peer_lost()) == ["Cancel", "Abandon", "CloseWindow"]
    assert receiver.state is Receiving.FAILING


@pytest.mark.parametrize("landed_at,now,reason", [(0.0, 2.1, "nothing landed for"), (9.9, 10.1, "not finished within")])
def test_receiver_budgets(landed_at: float, now: float, reason: str) -> None:
    receiver = make_receiver()
    receiver.landed(0, [0], now=landed_at)
    assert kinds(receiver.tick(now=now))[0] == "Cancel"
    assert reason in receiver.reason


def test_refusal_ends_at_once() -> None:
    receiver = Receiver(HANDLE, blocks=3, layers=LAYERS, lease_epoch=4, incarnation=2, now=0.0)
    assert kinds(receiver.refuse("KV layouts differ")) == ["Refuse", "Ended"]


def test_reasons_are_cut_before_they_are_forwarded_and_kept() -> None:
    long, kept = "prefill: " + "x" * 10_000, "prefill: " + "x" * (REASON_CHARS_MAX - 9)
    receiver = make_receiver()
    assert do.ToPeer(Cancel(**IDS | {"lease_epoch": 4, "incarnation": 2}, reason=kept)) in receiver.fail(
        long, tell_peer=True
    )
    assert receiver.reason == kept
    refusing = Receiver(HANDLE, blocks=3, layers=LAYERS, lease_epoch=4, incarnation=2, now=0.0)
    refuse = Refuse(**IDS | {"lease_epoch": 4, "incarnation": 2}, reason=kept)
    assert refusing.refuse(long) == [do.ToPeer(refuse), do.Ended(kept)]
