"""Clients that are confused, late or half dead: what they do costs them something, never the daemon or each other."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest
from daemon.fleet import PAGES, Daemon, Fleet, prompt_of, until
from wire_samples import ENGINE

from pdx.client import DaemonClient
from pdx.daemon.service import HELLOS_MAX
from pdx.errors import PdxError, Refused
from pdx.wire import Attach, LetGo, LoadEnded, LoadOpened, OpenLoad, Renew, SendEnded


@pytest.fixture
def fleet(unchecked_fleet: Fleet) -> Fleet:
    return unchecked_fleet


def live_leases(daemon: Daemon) -> int:
    return sum(daemon.stats()["store"]["leases"].values())


def test_a_prompt_whose_layer_needs_more_than_one_notice(fleet: Fleet) -> None:
    """1,600 checksums and digests do not fit into one notice of 64 KiB."""
    first, second = fleet.daemon(arena="64MiB"), fleet.daemon(arena="64MiB")
    prefill, decode = fleet.engine(first, "P"), fleet.engine(second, "D")
    prompt, handle = prompt_of(16 * 1600), fleet.handle(prefill, decode)
    prefill.prefill(prompt, handle)
    assert decode.load(prompt, handle) == 1600
    assert first.counter("pages_put") == 1600 * PAGES.layers
    first.wait_unleased()
    second.wait_unleased()


def test_a_lost_let_go_is_asked_for_again(fleet: Fleet) -> None:
    daemon = fleet.daemon(lease_s="0.3")
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    prefill.fill(opened, prompt, [0, 1, 2, 3])
    loaded = decode.open_load(prompt, handle)
    until(lambda: decode.pages_present(loaded, prompt) == 12, "all pages are there")
    # Neither engine's LET_GO arrives. Both handoff halves have done their work, so nothing else will ever ask.
    prefill.expect(SendEnded)
    decode.expect(LoadEnded)
    assert live_leases(daemon) > 0, "an expired lease is no reason to give its slots away"
    prefill.let_go(opened.handoff_id, "send")
    decode.let_go(loaded.handoff_id, "load")
    daemon.wait_unleased()


def test_a_lost_let_go_of_what_the_cache_served_is_asked_for_too(fleet: Fleet) -> None:
    daemon = fleet.daemon(lease_s="0.3")
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
    prefill.prefill(prompt, handle)
    decode.load(prompt, handle)
    daemon.wait_unleased()
    cached = decode.open_load(prompt, fleet.handle(prefill, decode))
    assert len(cached.places) == 4
    decode.expect_failed_load()
    daemon.wait_unleased()


def test_only_the_holder_lets_go(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    opened = prefill.open_send(prompt_of(64), fleet.handle(prefill, decode))
    decode.let_go(opened.handoff_id, "send", ok=False, fence=0)
    daemon.tool.send(LetGo(handoff_id=opened.handoff_id, side="send", fence=0, ok=False))
    decode.open_load(prompt_of(16, seed=9), fleet.handle(prefill, decode))  # answered behind the above
    assert live_leases(daemon) > 0
    prefill.let_go(opened.handoff_id, "send", ok=False)
    daemon.wait_unleased()


def test_only_the_holder_s_scheduler_renews(fleet: Fleet) -> None:
    """It alone knows which of its requests live. Whoever else did would keep slots that nobody uses."""
    daemon = fleet.daemon(lease_s="1")
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    opened = prefill.open_send(prompt_of(64), fleet.handle(prefill, decode))
    renew = Renew(handoff_ids=[opened.handoff_id], running=7)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        prefill.scheduler.send(renew)
        time.sleep(0.05)
    assert daemon.counter("leases_expired") == 0

    def expired() -> bool:
        for client in (decode.scheduler, prefill.worker, daemon.tool):
            client.send(renew)
        return daemon.counter("leases_expired") == 1

    until(expired, "the lease ends whatever others say", 5.0)
    assert daemon.counter("messages_of_tools") > 0
    prefill.expect_failed_send()
    daemon.wait_unleased()


def test_an_engine_comes_back_only_when_its_earlier_life_has_ended(fleet: Fleet) -> None:
    """Its old worker may be writing still: a scheduler of the new life must not answer for it."""
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    opened = prefill.open_send(prompt_of(64), fleet.handle(prefill, decode))
    prefill.scheduler.close()
    until(lambda: daemon.stats()["store"]["leases"]["quarantined"] > 0, "its death is seen")
    with pytest.raises(Refused, match="earlier life"):
        fleet.engine(daemon, "P")
    assert live_leases(daemon) > 0
    prefill.fill(opened, prompt_of(64), [0])  # late, harmless
    prefill.worker.close()
    daemon.wait_unleased()
    again = fleet.engine(daemon, "P")
    handle = fleet.handle(again, decode)
    again.prefill(prompt_of(64), handle)
    assert decode.load(prompt_of(64), handle) == 4


def test_an_engine_without_its_worker_is_told_to_compute(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    prompt, handle = prompt_of(40), fleet.handle(prefill, decode)
    for engine in (prefill, decode):
        engine.worker.close()
    until(lambda: not any(e["complete"] for e in daemon.stats()["engines"].values()), "both workers are gone")
    prefill.ask_send(prompt, handle)
    assert "worker" in prefill.expect(SendEnded, 2.0).reason
    decode.scheduler.send(OpenLoad(request_id="r", handle=handle, block_hashes=[], prompt_tokens=40, tail_hash=b""))
    assert decode.expect(LoadOpened, 2.0).status == "absent"


def test_a_client_that_talks_out_of_turn_is_not_taken_for_dead(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    prefill, decode = fleet.engine(daemon, "P"), fleet.engine(daemon, "D")
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    prefill.worker._voice._connection.send(b"hello?")
    prefill.fill(opened, prompt, [0, 1, 2, 3])
    prefill.let_go(opened.handoff_id, "send")
    assert decode.load(prompt, handle) == 4
    daemon.wait_unleased()


@pytest.mark.parametrize("address", ["localhost:5700", "tcp://", "tcp://nobody", "x" * 3000])
def test_a_router_address_that_is_none_costs_a_warning(fleet: Fleet, address: str) -> None:
    daemon = fleet.daemon()
    engine = fleet.engine(daemon, "P")
    info = engine.info
    engine.close()
    daemon.wait_unleased()
    until(lambda: not daemon.stats()["engines"], "it has left")
    scheduler = DaemonClient.attach(daemon.config, Attach(kind="scheduler", engine=info, router=address), start=False)
    worker = DaemonClient.attach(daemon.config, Attach(kind="worker", engine=info, pages=PAGES), start=False)
    with scheduler, worker:
        until(lambda: b"no router's address" in (daemon.run_dir / "log").read_bytes(), "the log says so")
        assert daemon.stats()["engines"]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("layout", "ranks", 0), ("layout", "ranks", -1), ("layout", "layers", 0), ("layout", "kv_groups", 2**40),
        ("content", "block_tokens", 0), ("content", "block_tokens", 2**64 - 1), ("", "engine_id", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["scheduler", "worker"])
def test_an_engine_that_can_t_be_is_turned_away(fleet: Fleet, kind: str, part: str, field: str, value: object) -> None:
    daemon = fleet.daemon()
    told = {field: value}
    if part:
        told = {part: msgspec.structs.replace(getattr(ENGINE, part), **told)}
    hello = Attach(
        kind=kind,  # type: ignore[arg-type]
        engine=msgspec.structs.replace(ENGINE, **told), pages=PAGES if kind == "worker" else None,
    )  # fmt: skip
    with pytest.raises(PdxError):
        DaemonClient.attach(daemon.config, hello, start=False)
    assert daemon.stats()["engines"] == {}


def test_connections_without_a_word_do_not_keep_others_out(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(HELLOS_MAX + 8)]
    for connection in silent:
        connection.connect(str(daemon.run_dir / "pdxd.sock"))
    with DaemonClient.attach(daemon.config, Attach(kind="tool"), start=False, deadline_s=5.0):
        pass
    assert b"too many" in silent[0].recv(1000)
    for connection in silent:
        connection.close()
