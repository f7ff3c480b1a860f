"""The sending half of a handoff, driven by pure events."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from counted import growth
from halves import HANDLE, IDS, LAYERS, PLACES, RESERVE, kinds, make_receiver, make_sender

from pdx.handoff import actions as do
from pdx.handoff.sender import OPEN_BYTES, PUT_BLOCKS_MAX, PUTS_OPEN, Sender
from pdx.handoff.states import Sending
from pdx.wire import ONE_REQUEST, REASON_CHARS_MAX, Fail, SendEnded, SendOpened


def fill_all(sender: Sender) -> list[do.Action]:
    return [action for layer in range(LAYERS) for action in sender.filled(layer, [0, 1, 2], now=0.1)]


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


def test_it_is_in_a_hurry_only_while_something_follows_from_the_end_of_a_put() -> None:
    sender = make_sender()
    assert not sender.hurried, "the grant does not come by a lane"
    sender.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    sender.filled(0, [0, 1, 2], now=0.1)
    assert not sender.hurried, "the next layer is yet to be computed"
    sender.filled(1, [0, 1, 2], now=0.1)
    assert sender.hurried, "COMMIT follows"
    sender.put_ended(ok=True, reason="", now=0.2)
    assert sender.hurried
    sender.put_ended(ok=True, reason="", now=0.2)
    assert not sender.hurried
    failing = make_sender()
    failing.granted(has=[], wanted=[0, 1, 2], lease_epoch=4, now=0.0)
    failing.filled(0, [0, 1, 2], now=0.1)
    failing.fail("x", tell_peer=True)
    assert failing.hurried, "its slots are free when the put has ended"


def test_it_is_in_a_hurry_while_pages_wait_for_room_among_puts() -> None:
    sender = Sender(
        HANDLE, request_id="r", blocks=8, layers=2, page_bytes=OPEN_BYTES // PUTS_OPEN, incarnation=1, now=0
    )
    sender.claimed(PLACES * 3, frozenset(range(8)), RESERVE, now=0.0)
    sender.granted(has=[], wanted=range(8), lease_epoch=4, now=0.0)
    sender.filled(0, range(PUTS_OPEN), now=0.1)
    assert not sender.hurried
    sender.filled(0, range(PUTS_OPEN, 8), now=0.1)
    assert sender.hurried


def test_what_is_filled_costs_the_same_in_a_long_prompt() -> None:
    """Most of its pages are filled while its first block is whole, and its last is not."""

    def filling(blocks: int) -> Callable[[], object]:
        sender = Sender(HANDLE, request_id="r", blocks=blocks, layers=2, page_bytes=64, incarnation=1, now=0.0)
        sender.claimed(PLACES[:1] * blocks, frozenset(range(blocks)), RESERVE, now=0.0)
        return lambda: [sender.filled(layer, [block], now=0.1) for block in range(blocks) for layer in range(2)]

    assert growth(filling) < 5


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
    sent = [sender.filled(0, [block], now=0.2) for block in range(8)]
    assert sent == [[do.Put(0, (block,))] for block in range(8)]
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
    assert ONE_REQUEST in sender.reason


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


def test_reasons_are_cut_before_they_are_forwarded_and_kept() -> None:
    long, kept = "refused by decode: " + "x" * 10_000, "refused by decode: " + "x" * (REASON_CHARS_MAX - 19)
    sender = make_sender()
    actions = sender.fail(long, tell_peer=True)
    assert sender.reason == kept
    assert actions[:2] == [
        do.ToEngine(SendEnded(request_id="r", handoff_id=HANDLE.handoff_id, reason=kept)),
        do.ToPeer(Fail(**IDS, reason=kept)),
    ]
    assert actions[-1] == do.Ended(kept)
