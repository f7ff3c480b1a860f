"""Both halves of a handoff, driven by pure events."""

from __future__ import annotations

import pytest
from wire_samples import PAGES

from pdx.errors import IllegalTransition
from pdx.handoff import actions as do
from pdx.handoff.handle import TransferHandle
from pdx.handoff.receiver import Receiver
from pdx.handoff.sender import OPEN_BYTES, PUT_BLOCKS_MAX, PUTS_OPEN, Sender
from pdx.handoff.states import RECEIVING, SENDING, Receiving, Sending, after
from pdx.layout import Place
from pdx.wire import Budgets, Commit, DaemonRef, Fail, Grant, LoadEnded, Reserve, SendEnded, SendOpened

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


def make_sender(fresh: set[int] | None = None) -> Sender:
    sender = Sender(HANDLE, request_id="r", blocks=3, layers=LAYERS, page_bytes=64, incarnation=1, now=0.0)
    sender.claimed(PLACES, frozenset({0, 1, 2} if fresh is None else fresh), RESERVE, now=0.0)
    return sender


def kinds(actions: list[do.Action]) -> list[str]:
    """Names of the actions; messages by their own name."""
    return [type(a.message).__name__ if isinstance(a, do.ToPeer | do.ToEngine) else type(a).__name__ for a in actions]


def fill_all(sender: Sender) -> list[do.Action]:
    return [action for layer in range(LAYERS) for action in sender.filled(layer, [0, 1, 2], now=0.1)]


# --- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "states"), [(SENDING, Sending), (RECEIVING, Receiving)])
def test_every_state_but_the_last_has_a_way_out_and_all_can_be_reached(table: dict, states: type) -> None:
    reached = {after for after in table.values()} | {next(iter(states))}
    assert reached == set(states)
    assert {state for state, _ in table} == set(states) - {states.ENDED}


def test_illegal_transitions_raise() -> None:
    with pytest.raises(IllegalTransition, match="'committed' is not possible in state 'sending'"):
        after(SENDING, Sending.SENDING, "committed")


# --- sender ---------------------------------------------------------------------------------------------------


def test_claim_opens_the_engine_and_reserves() -> None:
    sender = Sender(HANDLE, request_id="r", blocks=3, layers=LAYERS, page_bytes=64, incarnation=1, now=0.0)
    opened, reserve = sender.claimed(PLACES, frozenset({1, 2}), RESERVE, now=0.0)
    assert isinstance(opened, do.ToEngine)
    assert isinstance(opened.message, SendOpened)
    assert opened.message.places == [None, PLACES[1], PLACES[2]], "the engine need not save what the store has"
    assert reserve == do.ToPeer(RESERVE)


def test_pages_filled_before_grant_go_out_with_it_and_later_ones_at_once() -> None:
    sender = make_sender()
    assert sender.filled(0, [0, 1], now=0.1) == []
    assert sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.2) == [do.Put(0, (0, 1))]
    assert sender.filled(1, [0, 1], now=0.3) == [do.Put(1, (0, 1))]
    assert sender.filled(1, [0, 1], now=0.3) == [], "a page is sent once"


def test_commit_waits_for_every_page_and_every_put() -> None:
    sender = make_sender()
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    assert kinds(fill_all(sender)) == ["Put", "Publish", "Put"]
    assert sender.put_ended(ok=True, reason="", now=0.2) == []
    assert sender.put_ended(ok=True, reason="", now=0.2) == [do.SendCommit(pages=6)]
    assert sender.committed() == []
    assert sender.engine_let_go(ok=True, reason="") == [do.Ended("")]


def test_blocks_that_the_receiver_has_are_not_sent() -> None:
    sender = make_sender()
    sender.granted(has=[0, 1], wanted=[2], lease_epoch=4, now=0.0)
    puts = [action for action in fill_all(sender) if isinstance(action, do.Put)]
    assert puts == [do.Put(0, (2,)), do.Put(1, (2,))]


def test_blocks_that_the_store_held_go_out_without_the_engine() -> None:
    sender = make_sender(fresh={2})
    actions = sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    assert actions == [do.Put(0, (0, 1)), do.Put(1, (0, 1))]


def test_nothing_wanted_still_waits_for_the_engine_to_finish() -> None:
    """The receiver may share our slots: COMMIT before they are filled would be a lie."""
    sender = make_sender()
    assert sender.granted(has=[0, 1, 2], wanted=[], lease_epoch=4, now=0.0) == []
    assert kinds(fill_all(sender)) == ["Publish", "SendCommit"]


@pytest.mark.parametrize("has,wanted", [([0], [0, 1, 2]), ([], [0, 1]), ([], [0, 1, 2, 3])])
def test_a_grant_that_does_not_cover_the_prompt_fails(has: list[int], wanted: list[int]) -> None:
    sender = make_sender()
    sender.granted(has=has, wanted=wanted, lease_epoch=4, now=0.0)
    assert sender.state is Sending.ENDED
    assert "does not cover" in sender.reason


def test_failure_drains_before_it_ends() -> None:
    sender = make_sender()
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    sender.filled(0, [0, 1, 2], now=0.1)
    actions = sender.fail("engine died", tell_peer=True)
    assert kinds(actions) == ["SendEnded", "Fail", "StopPuts", "Abandon", "RevokeEngine"]
    assert sender.state is Sending.DRAINING
    assert sender.filled(1, [0], now=0.2) == [], "late pages of a failed handoff go nowhere"
    assert kinds(sender.put_ended(ok=False, reason="cancelled", now=0.3)) == ["Ended"]
    assert sender.fail("again", tell_peer=True) == []
    assert sender.reason == "engine died", "the first reason is the one kept"


def test_failure_after_publish_keeps_the_blocks_as_cache() -> None:
    sender = make_sender()
    fill_all(sender)
    assert "Abandon" not in kinds(sender.fail("peer died", tell_peer=False))


def test_bells_may_ring_after_the_engine_let_go() -> None:
    """LET_GO and FILLED travel on different sockets."""
    sender = make_sender()
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    assert sender.engine_let_go(ok=True, reason="") == []
    assert kinds(fill_all(sender)) == ["Put", "Publish", "Put"]
    sender.put_ended(ok=True, reason="", now=0.2)
    sender.put_ended(ok=True, reason="", now=0.2)
    assert sender.committed() == [do.Ended("")]


@pytest.mark.parametrize("layer", [-1, LAYERS, 2**63])
def test_layers_that_do_not_exist_are_not_filled(layer: int) -> None:
    sender = make_sender()
    assert sender.filled(layer, [0, 1, 2], now=0.1) == []
    assert "0/6 pages filled" in repr(sender)


def test_a_block_named_twice_is_put_once() -> None:
    sender = make_sender()
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    assert sender.filled(0, [1, 1, 0], now=0.1) == [do.Put(0, (1, 0))]


def test_a_put_has_no_more_blocks_than_a_notice_can_name() -> None:
    blocks = 2 * PUT_BLOCKS_MAX + 1
    sender = Sender(HANDLE, request_id="r", blocks=blocks, layers=1, page_bytes=64, incarnation=1, now=0.0)
    sender.claimed([PLACES[0]] * blocks, frozenset(), RESERVE, now=0.0)
    puts = sender.granted(has=[], wanted=range(blocks), lease_epoch=4, now=0.1)
    assert [len(put.blocks) for put in puts if isinstance(put, do.Put)] == [PUT_BLOCKS_MAX, PUT_BLOCKS_MAX, 1]
    ends = [sender.put_ended(ok=True, reason="", now=0.2) for _ in puts]
    assert ends == [[], [], [do.SendCommit(blocks)]]


def make_long(blocks: int, fresh: frozenset[int] = frozenset()) -> Sender:
    """Of pages of which two are a put, all of them there but those of `fresh` blocks."""
    sender = Sender(
        HANDLE, request_id="r", blocks=blocks, layers=LAYERS, page_bytes=OPEN_BYTES // PUTS_OPEN // 2, incarnation=1,
        now=0.0,
    )  # fmt: skip
    sender.claimed([PLACES[0]] * blocks, fresh, RESERVE, now=0.0)
    return sender


def test_of_a_prompt_that_is_whole_only_so_much_is_under_way_at_once_and_the_rest_follows_in_order() -> None:
    sender, blocks = make_long(10), range(10)
    puts = sender.granted(has=[], wanted=blocks, lease_epoch=4, now=0.1)
    assert puts == [do.Put(0, (block, block + 1)) for block in range(0, 8, 2)]
    for open_puts in puts:  # grows as it is walked: each end brings the next
        assert isinstance(open_puts, do.Put)
        puts += sender.put_ended(ok=True, reason="", now=0.2)
        if isinstance(puts[-1], do.SendCommit):
            break
    *sent, commit = puts
    assert sent == [do.Put(layer, (block, block + 1)) for layer in range(LAYERS) for block in range(0, 10, 2)]
    assert commit == do.SendCommit(pages=20)


def test_small_puts_go_out_at_once_however_many_there_are() -> None:
    """What counts is how much they carry: each step of a prefill has a few pages in each layer."""
    sender = make_long(8, fresh=frozenset(range(8)))
    sender.granted(has=[], wanted=range(8), lease_epoch=4, now=0.1)
    assert [sender.filled(0, [block], now=0.2) for block in range(8)] == [[do.Put(0, (block,))] for block in range(8)]
    assert sender.filled(1, [0], now=0.2) == []
    assert sender.put_ended(ok=True, reason="", now=0.3) == [do.Put(1, (0,))]


def test_what_waits_for_others_to_end_never_goes_out_after_a_failure() -> None:
    sender = make_long(10)
    puts = sender.granted(has=[], wanted=range(10), lease_epoch=4, now=0.1)
    sender.fail("engine died", tell_peer=True)
    ends = [kinds(sender.put_ended(ok=True, reason="", now=0.2)) for _ in puts]
    assert ends == [[], [], [], ["Ended"]]


def test_engine_giving_up_fails_the_handoff() -> None:
    sender = make_sender()
    actions = sender.engine_let_go(ok=False, reason="request aborted")
    assert kinds(actions) == ["SendEnded", "Fail", "StopPuts", "Abandon", "Ended"]


@pytest.mark.parametrize("silent_s,reason", [(1.1, "no GRANT")])
def test_sender_budgets_before_grant(silent_s: float, reason: str) -> None:
    sender = make_sender()
    assert sender.tick(now=silent_s - 0.2) == []
    assert isinstance(sender.tick(now=silent_s)[0].message, SendEnded)
    assert reason in sender.reason


def test_sender_budget_between_slabs_and_in_whole() -> None:
    sender = make_sender()
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.5)
    for step in range(6):
        now = 1.9 * (step + 1)
        assert (sender.tick(now=now) == []) == (now <= 10)
        sender.filled(0, [0], now=now)
    assert "not finished within" in sender.reason


def test_a_request_in_the_engines_queue_is_not_silence() -> None:
    """Under load, prefill may come to a request long after GRANT: its engine's renewals speak for it on both sides."""
    sender, receiver = make_sender(), make_receiver()
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    for second in range(1, 10):
        assert kinds(sender.renewed(now=float(second))) == ["Alive"]
        receiver.alive(now=float(second))
        assert sender.tick(now=second + 0.5) == receiver.tick(now=second + 0.5) == []
    assert sender.tick(now=11.1) != []
    assert receiver.tick(now=11.1) != []


def make_returning() -> Sender:
    sender = Sender(HANDLE, request_id="", blocks=3, layers=LAYERS, page_bytes=64, incarnation=1, now=0.0)
    assert kinds(sender.held(RESERVE, now=0.0)) == ["Reserve"], "there is no engine to be told"
    return sender


def test_without_an_engine_all_goes_out_with_the_grant_and_committed_is_the_end() -> None:
    sender = make_returning()
    assert sender.granted(has=[0], wanted=[1, 2], lease_epoch=4, now=0.1) == [do.Put(0, (1, 2)), do.Put(1, (1, 2))]
    assert sender.put_ended(ok=True, reason="", now=0.2) == []
    assert sender.put_ended(ok=True, reason="", now=0.2) == [do.SendCommit(pages=4)]
    assert sender.committed() == [do.Ended("")]


def test_without_an_engine_a_receiver_that_has_all_is_asked_for_its_word() -> None:
    sender = make_returning()
    assert sender.granted(has=[0, 1, 2], wanted=[], lease_epoch=4, now=0.1) == [do.SendCommit(pages=0)]
    assert sender.committed() == [do.Ended("")]


def test_without_an_engine_a_failure_takes_nothing_back_and_tells_nobody_here() -> None:
    """The blocks are cache, whatever becomes of their copies."""
    sender = make_returning()
    assert kinds(sender.fail("refused by decode: full", tell_peer=False)) == ["StopPuts", "Ended"]
    sender = make_returning()
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.1)
    assert kinds(sender.fail("lane lost", tell_peer=True)) == ["Fail", "StopPuts"]
    sender.put_ended(ok=False, reason="", now=0.2)
    assert kinds(sender.put_ended(ok=True, reason="", now=0.2)) == ["Ended"]


# --- receiver -------------------------------------------------------------------------------------------------


def make_receiver(wanted: tuple[int, ...] = (0, 1, 2)) -> Receiver:
    receiver = Receiver(HANDLE, blocks=3, layers=LAYERS, lease_epoch=4, incarnation=2, now=0.0)
    receiver.claimed(wanted, GRANT, windowed=True, now=0.0)
    return receiver


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
