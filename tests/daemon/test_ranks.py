"""Engines of several ranks: one handoff, one slot for all shards, and every rank's word counts once."""

from __future__ import annotations

import msgspec
import pytest
from daemon.fleet import PAGES, QUICK, BareEngine, Daemon, Fleet, prompt_of, until

from pdx.client import DaemonClient
from pdx.errors import Refused
from pdx.keys import space_of
from pdx.wire import Attach, LetGo, SendEnded, SendOpened

BLOCKS = 5
PROMPT = prompt_of(16 * BLOCKS)


@pytest.fixture
def fleet(unchecked_fleet: Fleet) -> Fleet:
    return unchecked_fleet


@pytest.fixture(params=["tcp", "same daemon"])
def daemons(request: pytest.FixtureRequest, fleet: Fleet) -> tuple[Daemon, Daemon]:
    first = fleet.daemon()
    return first, fleet.daemon() if request.param == "tcp" else first


def let_go(engine: BareEngine, opened: SendOpened, rank: int, *, reason: str = "") -> None:
    fence, ok = engine.step, not reason
    engine.workers[rank].send(LetGo(handoff_id=opened.handoff_id, side="send", fence=fence, ok=ok, reason=reason))


def live_leases(daemon: Daemon) -> int:
    return sum(daemon.stats()["store"]["leases"].values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_shard_of_every_page_arrives(fleet: Fleet, daemons: tuple[Daemon, Daemon], ranks: int) -> None:
    prefill, decode = (fleet.engine(d, name, ranks=ranks) for d, name in zip(daemons, "PD", strict=True))
    handle = fleet.handle(prefill, decode)
    opened = prefill.open_send(PROMPT, handle)
    prefill.fill(opened, PROMPT, list(range(BLOCKS)))
    for rank in range(ranks):
        let_go(prefill, opened, rank)
    assert decode.load(PROMPT, handle) == BLOCKS
    for daemon in daemons:
        daemon.wait_unleased()


def test_a_send_ends_when_every_rank_has_let_go(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P", ranks=2), fleet.engine(daemon, "D", ranks=2)
    opened = prefill.open_send(PROMPT, fleet.handle(prefill, decode, QUICK))
    prefill.fill(opened, PROMPT, list(range(BLOCKS)))
    until(lambda: daemon.counter("receives_settled") == 1, "decode does not come, its half ends")
    for _ in range(2):
        let_go(prefill, opened, 1)
    prefill.workers[1].close()  # behind its words: they have been heard when this has
    until(lambda: not daemon.stats()["engines"]["P"]["complete"], "the daemon has heard it leave")
    assert live_leases(daemon) > 0, "rank 0 has not let go, however often rank 1 says so"
    let_go(prefill, opened, 0)
    daemon.wait_unleased()


def test_a_send_is_as_good_as_the_worst_of_its_ranks(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P", ranks=2), fleet.engine(daemon, "D", ranks=2)
    opened = prefill.open_send(PROMPT, fleet.handle(prefill, decode))
    prefill.fill(opened, PROMPT, list(range(BLOCKS)), layers=range(PAGES.layers))
    let_go(prefill, opened, 1, reason="not all of its pages could be saved")
    let_go(prefill, opened, 0)
    assert "could be saved" in prefill.expect(SendEnded).reason
    daemon.wait_unleased()


def test_the_scheduler_lets_go_for_all_behind_the_fence_of_each(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P", ranks=2), fleet.engine(daemon, "D", ranks=2)
    opened = prefill.open_send(PROMPT, fleet.handle(prefill, decode))
    prefill.workers[0].publish_fence(3)
    prefill.let_go(opened.handoff_id, "send", ok=False, fence=3)
    other = prefill.open_send(prompt_of(16, seed=9), fleet.handle(prefill, decode))  # answered behind the above
    assert daemon.counter("sends_failed") == 0, "rank 1 may still be in step 3"
    prefill.workers[1].publish_fence(3)
    until(lambda: daemon.counter("sends_failed") == 1, "the fence has passed")
    prefill.let_go(other.handoff_id, "send", ok=False)
    daemon.wait_unleased()


def test_a_rank_that_dies_in_mid_handoff_fails_it_and_holds_until_the_others_are_quiet(
    fleet: Fleet, daemons: tuple[Daemon, Daemon]
) -> None:
    prefill, decode = (fleet.engine(d, name, ranks=2) for d, name in zip(daemons, "PD", strict=True))
    source, target = daemons
    handle = fleet.handle(prefill, decode)
    opened = prefill.open_send(PROMPT, handle)
    prefill.fill(opened, PROMPT, list(range(BLOCKS)), layers=range(PAGES.layers))  # rank 0's shard, all of it
    loaded = decode.open_load(PROMPT, handle)
    until(lambda: decode.pages_present(loaded, PROMPT) == BLOCKS * PAGES.layers, "one of two shards is there")
    prefill.workers[1].close()
    assert "engine died" in prefill.expect(SendEnded).reason
    decode.expect_failed_load()
    until(lambda: live_leases(source) == 1, "all that is left is the hold of rank 0, which may be writing")
    prefill.workers[0].close()
    source.wait_unleased()
    target.wait_unleased()


def test_a_rank_that_never_reports_costs_the_handoff_its_budget(fleet: Fleet, daemons: tuple[Daemon, Daemon]) -> None:
    prefill, decode = (fleet.engine(d, name, ranks=2) for d, name in zip(daemons, "PD", strict=True))
    handle = fleet.handle(prefill, decode, QUICK)
    opened = prefill.open_send(PROMPT, handle)
    prefill.fill(opened, PROMPT, list(range(BLOCKS)), layers=range(PAGES.layers))
    let_go(prefill, opened, 0)
    decode.open_load(PROMPT, handle)
    decode.expect_failed_load()
    prefill.expect_failed_send()
    for daemon in daemons:
        daemon.wait_unleased()


def test_no_request_is_taken_before_the_last_rank_is_there(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P", ranks=2), fleet.engine(daemon, "D", ranks=2)
    prefill.workers[1].close()
    until(lambda: not daemon.stats()["engines"]["P"]["complete"], "the daemon has heard it leave")
    prefill.ask_send(PROMPT, fleet.handle(prefill, decode))
    assert "not all workers" in prefill.expect(SendEnded).reason


def test_ranks_that_do_not_fit_together_are_turned_away(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    engine = fleet.engine(daemon, "P", ranks=2)
    with pytest.raises(Refused, match="attached already"):
        engine.attach_worker(1)
    with pytest.raises(Refused, match="no rank 2"):
        engine.attach_worker(2)
    wider = msgspec.structs.replace(engine.info, engine_id="Q")
    first = DaemonClient.attach(
        daemon.config, Attach(kind="worker", engine=wider, pages=engine.pages, rank=0), start=False
    )
    with first, pytest.raises(Refused, match="differ"):
        smaller = msgspec.structs.replace(engine.pages, page_bytes=64)
        DaemonClient.attach(daemon.config, Attach(kind="worker", engine=wider, pages=smaller, rank=1), start=False)


def test_unequal_numbers_of_ranks_never_pair_and_the_reason_says_so(fleet: Fleet) -> None:
    first, second = fleet.daemon(), fleet.daemon()
    prefill, decode = fleet.engine(first, "P", ranks=2), fleet.engine(second, "D")
    prefill.open_send(PROMPT, fleet.handle(prefill, decode))
    assert "tensor parallelism differs: 2 ranks there, 1 here" in prefill.expect_failed_send().reason


def test_blocks_of_engines_with_more_and_fewer_ranks_never_meet_under_one_key(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    engines = [fleet.engine(daemon, f"E{ranks}", ranks=ranks) for ranks in (1, 2)]
    assert len({space_of(engine.info.content, engine.info.layout) for engine in engines}) == 2
    one = fleet.handle(engines[0], engines[0])
    engines[0].prefill(PROMPT, one)
    assert engines[0].load(PROMPT, one) == BLOCKS
    opened = engines[1].open_send(PROMPT, fleet.handle(engines[1], engines[1]))
    assert None not in opened.places, "nothing of the other's is taken for its own"
    engines[1].let_go(opened.handoff_id, "send", ok=False)
    daemon.wait_unleased()
