"""Handoffs between real pdxd processes: over tcp and inside one daemon."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from daemon.fleet import PAGES, QUICK, BareEngine, Daemon, Fleet, Prompt, fleet_in, prompt_of, until

from pdx.errors import PeerGone, WireError
from pdx.transport.handshake import greet_as_connector
from pdx.transport.sockets import parse_endpoint
from pdx.verbs import Clear
from pdx.wire import ONE_REQUEST, Ask, Budgets, DaemonRef, LaneOffer, LoadEnded, Renew, SendEnded, SendOpened

DAEMON_OF_OTHERS = DaemonRef(
    daemon_id="x", incarnation=1, control="tcp://127.0.0.1:9", lanes=[LaneOffer(endpoint="tcp://127.0.0.1:9")]
)


def test_every_page_arrives_under_tls(fleet: Fleet, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed: it makes this test's certificates")
    from benchmarks.harness.certificates import Authority

    authority = Authority(tmp_path)
    settings = []
    for name in ("one", "other"):
        files = authority.issue(name)
        settings.append({"tls_cert": files.certificate, "tls_key": files.key, "tls_ca": files.authority})
    first, second = (fleet.daemon(**{key: str(path) for key, path in files.items()}) for files in settings)
    prefill, decode = fleet.engine(first, "P"), fleet.engine(second, "D")
    prompt, handle = prompt_of(100), fleet.handle(prefill, decode)
    prefill.prefill(prompt, handle)
    assert decode.load(prompt, handle) == len(prompt.names)
    for daemon in (first, second):
        (endpoint,) = json.loads((daemon.run_dir / "pdxd.json").read_text())["lanes"]
        with socket.create_connection(parse_endpoint(endpoint), timeout=10) as connection:
            with pytest.raises((WireError, PeerGone, OSError)):  # nobody gets in without
                greet_as_connector(connection, fleet.key_file.read_bytes())


@pytest.fixture(params=["tcp", "same daemon"])
def pair(request: pytest.FixtureRequest, fleet: Fleet) -> tuple[Fleet, BareEngine, BareEngine]:
    first = fleet.daemon()
    second = fleet.daemon() if request.param == "tcp" else first
    return fleet, fleet.engine(first, "P"), fleet.engine(second, "D")


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 100])
def test_every_page_arrives(pair: tuple[Fleet, BareEngine, BareEngine], tokens: int) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(tokens), fleet.handle(prefill, decode)
    prefill.prefill(prompt, handle)
    assert decode.load(prompt, handle) == len(prompt.names)


def test_decode_reads_along_while_prefill_computes(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(70), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    loaded = decode.open_load(prompt, handle)
    assert len(loaded.places) == 5
    assert decode.pages_present(loaded, prompt) == 0
    prefill.fill(opened, prompt, [0, 1], range(1))
    until(lambda: decode.pages_present(loaded, prompt) == 2, "the first layer of two blocks is there")
    prefill.fill(opened, prompt, [0, 1], range(1, PAGES.layers))
    prefill.fill(opened, prompt, [2, 3, 4])
    prefill.let_go(opened.handoff_id, "send")
    until(lambda: decode.pages_present(loaded, prompt) == 15, "all are there")
    decode.let_go(loaded.handoff_id, "load")


def test_shared_prefixes_are_sent_and_saved_once(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    fleet, prefill, decode = pair
    first, second = prompt_of(64), Prompt([*prompt_of(48).tokens, *range(900, 940)])
    for prompt in (first, second):
        handle = fleet.handle(prefill, decode)
        opened = prefill.prefill(prompt, handle)
        assert decode.load(prompt, handle) == len(prompt.names)
        prefill.daemon.wait_unleased()  # what prefill has let go comes another way than what it asks next
    assert [place is None for place in opened.places] == [True] * 3 + [False] * 3
    if prefill.daemon is not decode.daemon:
        assert prefill.daemon.counter("pages_put") == (4 + 3) * PAGES.layers


def test_many_at_once_and_more_than_fit(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    """The arena holds 168 blocks; 12 prompts of 40 take turns, and cache is evicted for them."""
    fleet, prefill, decode = pair
    prompts = [prompt_of(640, seed) for seed in range(12)]
    handles = [fleet.handle(prefill, decode) for _ in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        prefill.prefill(prompt, handle)
        assert decode.load(prompt, handle) == 40
    assert decode.daemon.stats()["store"]["evicted_blocks"] > 0


def test_a_full_arena_makes_them_wait_in_order(tmp_path: Path) -> None:
    with fleet_in(tmp_path) as fleet:
        daemon = fleet.daemon()
        prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
        prompts = [prompt_of(16 * 90, seed) for seed in range(2)]
        handles = [fleet.handle(prefill, decode) for _ in prompts]
        opened = prefill.open_send(prompts[0], handles[0])
        prefill.ask_send(prompts[1], handles[1])
        until(lambda: daemon.stats()["reservations_waiting"] == 1, "the second waits")
        prefill.fill(opened, prompts[0], list(range(90)))
        prefill.let_go(opened.handoff_id, "send")
        assert decode.load(prompts[0], handles[0]) == 90
        second = prefill.expect(SendOpened)
        prefill.fill(second, prompts[1], list(range(90)))
        prefill.let_go(second.handoff_id, "send")
        assert decode.load(prompts[1], handles[1]) == 90
        daemon.wait_unleased()


def test_what_is_cleared_while_it_waits_for_room_is_handed_over_and_found_by_nobody(tmp_path: Path) -> None:
    with fleet_in(tmp_path) as fleet:
        here, there = fleet.daemon(), fleet.daemon()
        prefill, decode = fleet.engine(here, "P"), fleet.engine(there, "D")
        large, small = prompt_of(16 * 120, seed=1), prompt_of(16 * 60, seed=2)
        held = decode.open_keep(large.hashes)
        handle = fleet.handle(prefill, decode)
        prefill.prefill(small, handle)
        until(lambda: there.stats()["reservations_waiting"] == 1, "decode's host has no room")
        assert not there.tool.ask(Ask(verb=Clear())).error
        decode.let_go(held.handoff_id, "send", ok=False)
        assert decode.load(small, handle) == 60, "who waits for it gets it"
        there.wait_unleased()
        assert decode.look_up(small.hashes) == 0


def test_a_prompt_larger_than_the_arena_is_refused_in_one_sentence(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(16 * 1000), fleet.handle(prefill, decode)
    prefill.ask_send(prompt, handle)
    assert prefill.expect(SendEnded).reason.startswith(f"{ONE_REQUEST}a prompt of 1000 blocks")
    assert decode.load(prompt, handle) == 0


def test_so_is_one_larger_than_the_other_arena(fleet: Fleet) -> None:
    prefill, decode = fleet.engine(fleet.daemon(), "P"), fleet.engine(fleet.daemon(arena="1MiB"), "D")
    prefill.ask_send(prompt_of(16 * 60), fleet.handle(prefill, decode))
    opened = prefill.expect(SendOpened)
    assert prefill.expect(SendEnded).reason.startswith(f"refused by decode: {ONE_REQUEST}a prompt of 60 blocks")
    prefill.let_go(opened.handoff_id, "send", ok=False)


def test_the_tail_of_another_prompt_is_not_used(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    fleet, prefill, decode = pair
    handle = fleet.handle(prefill, decode)
    prefill.prefill(prompt_of(40), handle)
    other = Prompt([*prompt_of(32).tokens, 1, 2, 3])
    assert decode.load(other, handle) == 2


def test_both_daemons_know_the_trace_of_a_client(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    fleet, prefill, decode = pair
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    prompt, handle = prompt_of(40), fleet.handle(prefill, decode, traceparent=trace)
    handoff_id = prefill.prefill(prompt, handle).handoff_id
    assert decode.load(prompt, handle) == len(prompt.names)
    told = {
        event["what"]: event["traceparent"]
        for daemon in (prefill.daemon, decode.daemon)
        for event in daemon.tool.ask(Ask(verb="trace", handoff_id=handoff_id)).body["events"]
        if "traceparent" in event
    }
    assert told == {"open_send": trace, "reserve": trace}


@pytest.mark.parametrize("change", ["forged", "expired", "other daemon", "replayed"])
def test_bad_handles_serve_without(pair: tuple[Fleet, BareEngine, BareEngine], change: str) -> None:
    fleet, prefill, decode = pair
    prompt = prompt_of(40)
    handle = fleet.handle(prefill, decode)
    if change == "forged":
        handle = handle[:-8] + "AAAAAAAA"
    elif change == "expired":
        handle = fleet.handle(prefill, decode, issued_unix_s=1.0)
    elif change == "other daemon":
        handle = fleet.handle(prefill, decode, prefill_daemon=DAEMON_OF_OTHERS, decode_daemon=DAEMON_OF_OTHERS)
    else:
        prefill.prefill(prompt, handle)
        assert decode.load(prompt, handle) == 3
        decode.daemon.wait_unleased()
        prefill.daemon.wait_unleased()
    prefill.ask_send(prompt, handle)
    assert "handle refused" in prefill.expect(SendEnded).reason
    assert decode.load(prompt, handle) == (2 if change == "replayed" else 0), "cache may serve, the tail may not"


def test_engines_that_differ_are_not_paired(tmp_path: Path) -> None:
    with fleet_in(tmp_path) as fleet:
        first, second = fleet.daemon(), fleet.daemon()
        prefill = fleet.engine(first, "P", layout="vec")
        other_layout, other_model = fleet.engine(second, "D1", layout="amx"), fleet.engine(second, "D2", model="n")
        for decode, reason in ((other_layout, "KV layouts differ"), (other_model, "model contents differ")):
            handle = fleet.handle(prefill, decode)
            prefill.open_send(prompt_of(40), handle)
            assert reason in prefill.expect_failed_send().reason
            assert decode.load(prompt_of(40), handle) == 0
        first.wait_unleased()
        second.wait_unleased()


# --- failures -------------------------------------------------------------------------------------------------


def test_prefill_engine_dies_in_mid_prompt(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    loaded = decode.open_load(prompt, handle)
    prefill.fill(opened, prompt, [0, 1])
    prefill.close()
    assert "died" in decode.expect(LoadEnded).reason
    assert decode.pages_present(loaded, prompt) <= 6
    decode.let_go(loaded.handoff_id, "load", ok=False)  # only now: afterwards the slots are anybody's


def test_decode_engine_dies_while_it_loads(pair: tuple[Fleet, BareEngine, BareEngine]) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    decode.open_load(prompt, handle)
    prefill.fill(opened, prompt, [0, 1])
    decode.close()
    prefill.expect_failed_send()
    prefill.fill(opened, prompt, [2, 3])  # late, harmless


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_daemon_dies(tmp_path: Path, victim: str) -> None:
    with fleet_in(tmp_path) as fleet:
        daemons = {"prefill": fleet.daemon(), "decode": fleet.daemon()}
        prefill, decode = fleet.engine(daemons["prefill"], "P"), fleet.engine(daemons["decode"], "D")
        prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
        opened = prefill.open_send(prompt, handle)
        decode.open_load(prompt, handle)
        prefill.fill(opened, prompt, [0, 1])
        daemons[victim].kill()
        survivor: Daemon = daemons["decode" if victim == "prefill" else "prefill"]
        if victim == "prefill":
            until(lambda: not prefill.worker.alive, "the engine notices")
            decode.expect_failed_load()
        else:
            prefill.expect_failed_send()
        survivor.wait_unleased()


def test_what_has_landed_outlives_the_daemon_that_sent_it(fleet: Fleet) -> None:
    """Decode's engine may come for it when prefill's host has gone, and gets the tail too."""
    source, target = fleet.daemon(), fleet.daemon()
    prefill, decode = fleet.engine(source, "P"), fleet.engine(target, "D")
    prompt, handle = prompt_of(40), fleet.handle(prefill, decode, Budgets(claim_s=60.0))
    prefill.prefill(prompt, handle)
    until(lambda: source.counter("sends_settled") == 1, "it has landed")
    other, other_handle = prompt_of(64, seed=1), fleet.handle(prefill, decode)
    prefill.open_send(other, other_handle)
    decode.open_load(other, other_handle)
    source.kill()
    assert "prefill daemon is gone" in decode.expect_failed_load().reason
    assert decode.load(prompt, handle) == 3
    target.wait_unleased()


def test_a_silent_prefill_engine_loses_its_lease_but_not_the_quarantine(tmp_path: Path) -> None:
    """SIGSTOP past every budget, then SIGCONT: its late writes touch slots that nobody else was given."""
    with fleet_in(tmp_path) as fleet:
        daemon = fleet.daemon(lease_s="0.3")
        prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
        prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
        opened = prefill.open_send(prompt, handle)
        loaded = decode.open_load(prompt, handle)
        decode.expect(LoadEnded)
        decode.let_go(loaded.handoff_id, "load", ok=False)
        until(lambda: daemon.stats()["store"]["slots"]["quarantine"] > 0, "its slots are in quarantine")
        others = prompt_of(16 * 100, seed=3)
        other_handle = fleet.handle(prefill, decode)
        other = prefill.open_send(others, other_handle)
        held = {place.slot_offset for place in opened.places if place}
        assert held.isdisjoint({place.slot_offset for place in other.places if place})
        prefill.fill(opened, prompt, [0, 1, 2, 3])  # awake again, and late
        prefill.fill(other, others, list(range(100)))
        prefill.let_go(other.handoff_id, "send")
        assert decode.load(others, other_handle) == 100
        assert daemon.stats()["store"]["slots"]["quarantine"] > 0
        prefill.let_go(opened.handoff_id, "send", ok=False)
        daemon.wait_unleased()


def test_an_engine_that_does_not_let_go_is_asked_again(tmp_path: Path) -> None:
    """Its answer, or the question, may have been lost."""
    with fleet_in(tmp_path) as fleet:
        daemon = fleet.daemon(lease_s="0.3")
        prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
        opened = prefill.open_send(prompt_of(64), fleet.handle(prefill, decode))
        for _ in range(4):  # at the lease's end both the lease and the handoff say so
            assert prefill.expect(SendEnded).handoff_id == opened.handoff_id
        prefill.let_go(opened.handoff_id, "send", ok=False)
        daemon.wait_unleased()


def test_a_fence_that_has_not_passed_keeps_the_slots(tmp_path: Path) -> None:
    with fleet_in(tmp_path) as fleet:
        daemon = fleet.daemon()
        prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
        opened = prefill.open_send(prompt_of(64), fleet.handle(prefill, decode))
        prefill.let_go(opened.handoff_id, "send", ok=False, fence=5)
        assert daemon.stats()["store"]["leases"]["live"] + daemon.stats()["store"]["leases"]["quarantined"] > 0
        prefill.worker.publish_fence(5)
        daemon.wait_unleased()


def test_a_request_that_waits_in_prefills_queue_outlives_the_slab_budget(
    pair: tuple[Fleet, BareEngine, BareEngine],
) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode, QUICK)
    opened = prefill.open_send(prompt, handle)
    loaded = decode.open_load(prompt, handle)
    end = time.monotonic() + 2.5 * QUICK.slab_s
    while time.monotonic() < end:
        for engine, handoff in ((prefill, opened), (decode, loaded)):
            engine.scheduler.send(Renew(handoff_ids=[handoff.handoff_id]))
        decode.scheduler.wait(0.2)
    prefill.fill(opened, prompt, [0, 1, 2, 3])
    prefill.let_go(opened.handoff_id, "send")
    until(lambda: decode.pages_present(loaded, prompt) == 12, "all pages land")
    decode.let_go(loaded.handoff_id, "load")


@pytest.mark.parametrize("silent", ["prefill never fills", "decode never comes"])
def test_budgets_end_what_nobody_finishes(pair: tuple[Fleet, BareEngine, BareEngine], silent: str) -> None:
    fleet, prefill, decode = pair
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode, QUICK)
    if silent == "prefill never fills":
        prefill.open_send(prompt, handle)
        prefill.expect_failed_send()
    else:
        prefill.prefill(prompt, handle)
