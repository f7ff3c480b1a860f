"""Who is routable when: joining, health, silence, new incarnations, goodbyes."""

from __future__ import annotations

from engine_fakes import daemon_ref, engine_info

from pdx.keys import space_of
from pdx.router.choice.policy import fit
from pdx.router.engines import directory as limits
from pdx.router.engines.directory import Directory
from pdx.wire import Announce, EngineInfo, EngineLoad, LinkRate

P0, D0 = engine_info("p0", "prefill"), engine_info("d0", "decode")


def announce(*engines: EngineInfo, incarnation: int = 1, daemon_id: str = "d0", **more: object) -> Announce:
    return Announce(daemon=daemon_ref(daemon_id, incarnation), engines=list(engines), **more)


def joined(*engines: EngineInfo, now: float = 0.0) -> Directory:
    directory = Directory()
    assert directory.on_announce(announce(*engines), now) == []
    for engine in engines:
        directory.on_health(engine.engine_id, engine.url, True, now)
    return directory


def ids(directory: Directory) -> list[str]:
    return sorted(candidate.engine_id for candidate in directory.snapshot())


def pairable(directory: Directory) -> list[str]:
    return sorted(candidate.engine_id for candidate in directory.snapshot() if candidate.pairable)


def test_an_engine_is_routable_after_its_first_health() -> None:
    directory = Directory()
    directory.on_announce(announce(P0, D0), 0.0)
    assert (ids(directory), directory.joining()) == ([], ["d0", "p0"])
    assert [engine_id for engine_id, _ in directory.due_polls(0.0)] == ["p0", "d0"]
    assert directory.due_polls(0.1) == []  # asked, not answered
    directory.on_health("p0", P0.url, False, 0.2)
    assert directory.due_polls(0.6) == []
    assert [engine_id for engine_id, _ in directory.due_polls(0.7)] == ["p0"]
    directory.on_health("p0", P0.url, True, 0.8)
    assert (ids(directory), directory.joining()) == (["p0"], ["d0"])
    assert [engine_id for engine_id, _ in directory.due_polls(5.0)] == ["d0"]
    assert [engine_id for engine_id, _ in directory.due_polls(5.8)] == ["p0"]
    assert repr(directory) == "<Directory 1 daemons, 2 engines, 1 ready>"


def test_one_missed_poll_is_forgiven() -> None:
    directory = joined(P0)
    directory.on_health("p0", P0.url, False, 5.0)
    assert ids(directory) == ["p0"]
    directory.on_health("p0", P0.url, False, 5.5)
    assert ids(directory) == []
    directory.on_health("p0", P0.url, True, 6.0)
    assert ids(directory) == ["p0"]
    directory.on_health("unknown", P0.url, True, 6.0)


def test_a_refused_connection_counts_at_once() -> None:
    directory = joined(P0)
    directory.on_unreachable("p0", 1.0)
    assert ids(directory) == []
    assert [engine_id for engine_id, _ in directory.due_polls(1.5)] == ["p0"]


def test_data_parallel_ranks_behind_one_url_are_engines_of_their_own_that_go_together() -> None:
    ranks = [engine_info(f"d_dp{rank}", "decode", data_parallel_rank=rank) for rank in range(2)]
    directory = joined(P0, *ranks)
    assert ids(directory) == ["d_dp0", "d_dp1", "p0"]
    directory.on_unreachable("d_dp1", 1.0)
    assert ids(directory) == ["p0"], "the other one's server is the same"


def test_an_engine_left_out_has_left() -> None:
    directory = joined(P0, D0)
    directory.on_announce(announce(D0), 1.0)
    assert ids(directory) == ["d0"]
    assert directory.models() == ["smol"]


def test_a_silent_daemon_loses_its_pairs_and_later_its_engines() -> None:
    directory = joined(P0)
    assert directory.expire(3.5) == []
    assert directory.expire(3.6) == ["d0"]
    assert (ids(directory), pairable(directory)) == (["p0"], [])
    directory.expire(limits.ORPHAN_S)
    assert ids(directory) == ["p0"]
    directory.expire(limits.ORPHAN_S + 0.1)
    assert ids(directory) == []
    assert directory.models() == []


def test_a_dead_engine_of_a_silent_daemon_goes_at_once() -> None:
    directory = joined(P0, D0)
    directory.on_unreachable("p0", 3.0)
    directory.expire(4.0)
    assert (ids(directory), directory.joining()) == (["d0"], [])


def test_a_new_incarnation_adopts_engines_one_by_one() -> None:
    directory = joined(P0, D0)
    directory.on_announce(announce(D0, incarnation=2), 1.0)
    assert (ids(directory), pairable(directory)) == (["d0", "p0"], ["d0"])
    assert not directory.knows_daemon(daemon_ref(incarnation=1))
    assert directory.knows_daemon(daemon_ref(incarnation=2))
    directory.on_announce(announce(D0, P0, incarnation=2), 2.0)
    assert pairable(directory) == ["d0", "p0"]
    assert {candidate.daemon.incarnation for candidate in directory.snapshot()} == {2}
    directory.on_announce(announce(D0, incarnation=2), 3.0)
    assert ids(directory) == ["d0"]


def test_goodbye() -> None:
    directory = joined(P0)
    directory.on_announce(announce(leaving=True), 1.0)
    assert pairable(directory) == []
    assert directory.expire(1.0) == []


def test_a_changed_engine_joins_anew() -> None:
    directory = joined(P0)
    directory.on_announce(announce(engine_info("p0", "prefill", "http://127.0.0.1:2")), 1.0)
    assert ids(directory) == []
    assert directory.due_polls(1.0) == [("p0", "http://127.0.0.1:2")]
    directory.on_health("p0", P0.url, True, 1.1)
    assert ids(directory) == [], "where it was before, something answers"
    directory.on_health("p0", "http://127.0.0.1:2", True, 1.2)
    assert ids(directory) == ["p0"]


def test_an_id_is_taken_once() -> None:
    directory = joined(P0)
    other = engine_info("p0", "prefill", "http://127.0.0.1:2")
    warnings = directory.on_announce(announce(other, daemon_id="d1"), 1.0)
    assert warnings == ["engine id p0 is taken by http://127.0.0.1:1"]
    assert ids(directory) == ["p0"]
    directory.expire(3.6)  # d0 is silent
    assert directory.on_announce(announce(other, daemon_id="d1"), 3.7) == []


def test_engines_without_a_usable_url() -> None:
    directory = Directory()
    urls = ["", "file:///etc/passwd", "http://[::1"]
    odd = [engine_info(f"p{number}", "prefill", url) for number, url in enumerate(urls)]
    warnings = directory.on_announce(announce(*odd), 0.0)
    assert warnings == [f"engine p{n}: {urls[n]!r} is not an http url" for n in (1, 2)]
    assert directory.due_polls(0.0) == []


def test_announced_load() -> None:
    directory = joined(P0)
    loads = [EngineLoad(engine_id="p0", waiting=3), EngineLoad(engine_id="ghost", waiting=9)]
    directory.on_announce(announce(P0, loads=loads, reservations_waiting=2), 1.0)
    assert directory.snapshot()[0].waiting == 3
    assert directory.reservations_waiting() == 2


def test_new_weights_part_a_pair_at_once_and_leave_both_routable() -> None:
    """Neither has to answer /health anew for it: a pool whose weights are updated would be empty meanwhile."""
    directory = joined(P0, D0)
    assert paired(directory)
    directory.on_announce(announce(P0, D0.at("ab" * 16)), 1.0)
    assert ids(directory) == pairable(directory) == ["d0", "p0"]
    assert not paired(directory)
    directory.on_announce(announce(P0.at("cd" * 16), D0.at("ab" * 16)), 2.0)
    assert not paired(directory), "both have been updated, to different weights"
    directory.on_announce(announce(P0.at("ab" * 16), D0.at("ab" * 16)), 3.0)
    assert paired(directory)
    assert ids(directory) == ["d0", "p0"]


def paired(directory: Directory) -> bool:
    candidates = {candidate.engine_id: candidate for candidate in directory.snapshot()}
    return fit(candidates["p0"], candidates["d0"], P0.model)


def test_announced_paces_of_engines_and_links() -> None:
    directory = joined(P0, D0)
    loads, links = [EngineLoad(engine_id="p0", tokens_per_s=900.0)], [LinkRate(daemon_id="d9", bytes_per_s=1e9)]
    directory.on_announce(announce(P0, D0, loads=loads, links=links), 1.0)
    seen = {candidate.engine_id: candidate for candidate in directory.snapshot()}
    assert (seen["p0"].told_tokens_per_s, seen["d0"].told_tokens_per_s) == (900.0, 0.0)
    assert seen["p0"].links == {"d9": 1e9}
    assert seen["p0"].space == space_of(P0.content, P0.layout)
    directory.on_announce(announce(P0.at("ab" * 16), D0), 2.0)
    seen = {candidate.engine_id: candidate for candidate in directory.snapshot()}
    assert seen["p0"].space == space_of(P0.at("ab" * 16).content, P0.layout) != seen["d0"].space
    directory.expire(9.0)
    assert {candidate.links.get("d9") for candidate in directory.snapshot()} == {None}


def test_a_named_engine_stays_as_long_as_it_says_what_it_serves() -> None:
    directory = Directory()
    named = engine_info("named-x", "decode", "http://127.0.0.1:7/")
    for second in range(100):
        directory.on_named(named, float(second))
        directory.expire(second + 0.5)
        assert directory.joining() == ["named-x"]
    directory.on_health("named-x", named.url, True, 99.0)
    assert [(c.engine_id, c.pairable) for c in directory.snapshot()] == [("named-x", False)]
    directory.on_announce(
        Announce(daemon=daemon_ref(), engines=[engine_info("d0", "decode", "http://127.0.0.1:7")]), 100.0
    )
    directory.on_named(named, 100.5)
    assert directory.joining() == ["d0"], "it gives way"
    assert directory.snapshot() == ()
    directory.on_announce(Announce(daemon=daemon_ref(), engines=[], leaving=True), 101.0)
    directory.expire(101.0)
    directory.on_named(named, 102.0)
    assert directory.joining() == ["named-x"], "and comes back"
    directory.expire(102.0 + 2 * limits.ORPHAN_S)
    assert directory.joining() == []
