"""Real daemons and the lanes between them: asked for, failing, replaced, required. One lane comes from outside pdx."""

from __future__ import annotations

import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from daemon import test_handoff_pairs as pairs
from daemon.fleet import QUICK, BareEngine, Daemon, Fleet, prompt_of, until
from lanes_here import needing

from pdx.client import DaemonClient
from pdx.errors import ConfigError
from pdx.transport.rdma import rdma_here
from pdx.wire import Attach, DaemonRef, LaneOffer

ONE_SIDED = [
    pytest.param("cma", marks=needing("cma")),
    pytest.param("nixl", marks=[*needing("nixl"), pytest.mark.prove]),
]
Pair = tuple[Fleet, BareEngine, BareEngine]


def pair_over(fleet: Fleet, scheme: str) -> Pair:
    first, second = fleet.daemon(transport=scheme), fleet.daemon(transport=scheme)
    return fleet, fleet.engine(first, "P"), fleet.engine(second, "D")


@pytest.fixture
def pair(example: None, fleet: Fleet) -> Pair:
    return pair_over(fleet, "cma")


def lanes_of(daemon: Daemon) -> dict[str, Any]:
    lanes: dict[str, Any] = daemon.stats()["lanes"]
    return lanes


def hand_over(pair: Pair, seed: int, decode_ref: DaemonRef | None = None) -> int:
    """The number of blocks that decode has loaded, each page of them checked."""
    fleet, prefill, decode = pair
    changes = {"decode_daemon": decode_ref} if decode_ref is not None else {}
    prompt, handle = prompt_of(64, seed), fleet.handle(prefill, decode, **changes)
    prefill.prefill(prompt, handle)
    return decode.load(prompt, handle)


@pytest.mark.parametrize("scheme", ONE_SIDED)
def test_a_lane_that_is_asked_for_is_taken_and_told(example: None, fleet: Fleet, scheme: str) -> None:
    pair = pair_over(fleet, scheme)
    source, target = pair[1].daemon, pair[2].daemon
    assert [hand_over(pair, seed) for seed in range(2)] == [4, 4]
    for daemon in (source, target):
        assert [offer["endpoint"].partition("://")[0] for offer in lanes_of(daemon)["here"]] == [scheme, "tcp"]
    told = lanes_of(source)["peers"][target.ref.daemon_id]
    assert (told["lane"].partition("://")[0], told["reason"]) == (scheme, "asked for")
    assert source.counter(f"handoffs_by_{scheme}") == 2
    said = [line for line in (source.run_dir / "log").read_text().splitlines() if "lane to daemon" in line]
    assert len(said) == 1
    assert f": {scheme}://" in said[0]


@pytest.mark.parametrize("case", [
    pairs.test_many_at_once_and_more_than_fit, pairs.test_prefill_engine_dies_in_mid_prompt,
    pairs.test_decode_engine_dies_while_it_loads,
])  # fmt: skip
@pytest.mark.parametrize("scheme", [pytest.param("cma", marks=needing("cma"))])
def test_what_holds_over_tcp_holds_here(pair: Pair, case: Callable[[Pair], None], scheme: str) -> None:
    case(pair)
    assert pair[1].daemon.counter(f"handoffs_by_{scheme}") > 0


@pytest.mark.parametrize("end", ["goes on", "is killed"])
@pytest.mark.parametrize("scheme", [pytest.param("cma", marks=needing("cma"))])
def test_a_sender_that_is_stopped_keeps_the_slots_that_it_may_write(pair: Pair, scheme: str, end: str) -> None:
    """Nobody checks a one-sided write: no budget frees what a peer was granted, only its own word or its end."""
    fleet, prefill, decode = pair
    source, target = prefill.daemon, decode.daemon
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode, QUICK)
    opened = prefill.open_send(prompt, handle)
    loaded = decode.open_load(prompt, handle)
    prefill.fill(opened, prompt, [0, 1])
    until(lambda: decode.pages_present(loaded, prompt) == 6, "the first pages land")
    source.process.send_signal(signal.SIGSTOP)
    decode.expect_failed_load()  # its budget has passed
    held = until(lambda: target.stats()["store"]["slots"]["quarantine"], "its slots are in quarantine")
    others = prompt_of(16 * 100, seed=3)
    assert decode.look_up(others.hashes) == 0  # a turn of the loop, with room to spare
    assert target.stats()["store"]["slots"]["quarantine"] == held
    if end == "goes on":
        source.process.send_signal(signal.SIGCONT)
        prefill.expect_failed_send()
    else:
        source.kill()
    target.wait_unleased()


class Relay:
    """Passes a lane's connections on, until it is cut: then nobody reaches what is behind it any more."""

    def __init__(self, endpoint: str) -> None:
        self.scheme, _, address = endpoint.partition("://")
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"{self.scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._other: dict[socket.socket, socket.socket] = {}
        self._cut_read, self._cut_write = socket.socketpair()
        self._selector.register(self._cut_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def in_place_of(self, ref: DaemonRef) -> DaemonRef:
        offers = [
            LaneOffer(endpoint=self.endpoint, devices=offer.devices) if offer.scheme == self.scheme else offer
            for offer in ref.lanes
        ]
        return msgspec.structs.replace(ref, lanes=offers)

    def cut(self) -> None:
        """Idempotent."""
        self._cut_write.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is self._cut_read:
                    self._end()
                    return
                if ready is self._listener:
                    near, far = self._listener.accept()[0], socket.create_connection(self._target)
                    self._other.update({near: far, far: near})
                    for each in (near, far):
                        self._selector.register(each, selectors.EVENT_READ)
                elif data := ready.recv(1 << 16):
                    self._other[ready].sendall(data)
                else:
                    self._selector.unregister(ready)
                    self._other[ready].shutdown(socket.SHUT_WR)

    def _end(self) -> None:
        for each in (*self._other, self._listener, self._cut_read):
            each.close()
        self._selector.close()


@pytest.fixture
def relay(pair: Pair) -> Iterator[Relay]:
    relay = Relay(pair[2].daemon.ref.lanes[0].endpoint)
    yield relay
    relay.cut()


@pytest.mark.parametrize("scheme", [pytest.param("cma", marks=needing("cma"))])
def test_a_lane_that_dies_fails_its_handoffs_and_tcp_takes_the_next(pair: Pair, relay: Relay, scheme: str) -> None:
    fleet, prefill, decode = pair
    source, target = prefill.daemon, decode.daemon
    ref = relay.in_place_of(target.ref)
    assert hand_over(pair, 1, ref) == 4
    prompt, handle = prompt_of(64, 2), fleet.handle(prefill, decode, decode_daemon=ref)
    opened = prefill.open_send(prompt, handle)
    loaded = decode.open_load(prompt, handle)
    prefill.fill(opened, prompt, [0, 1])
    until(lambda: decode.pages_present(loaded, prompt) == 6, "the first pages land")
    relay.cut()
    assert f"lane {scheme} lost" in prefill.expect_failed_send().reason
    decode.expect_failed_load()
    assert source.counter(f"lanes_lost_{scheme}") == 1
    target.wait_unleased()  # the peer is not gone, but can't write any more

    assert hand_over(pair, 3, ref) == 4
    told = lanes_of(source)["peers"][target.ref.daemon_id]
    assert told["lane"].startswith("tcp://")
    assert told["reason"] == f"{scheme} failed between the two"
    assert told["resting"][relay.endpoint]["losses"] == 1
    assert source.counter("handoffs_by_tcp") == 1


# --- at start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--require-rdma"], "require_rdma can't be met: no RDMA device here"),
        (["--require-rdma", "--transport=tcp"], "require_rdma can't be met by transport tcp: choose auto, nixl or ucx"),
        pytest.param(["--transport=ucx"], "ucx:// needs RDMA, since without it", marks=needing("ucx")),
        (["--transport=pigeon"], "no lane for scheme 'pigeon'; known: nixl, tcp, ucx"),
    ],
)
@pytest.mark.skipif(bool(rdma_here().devices), reason="RDMA can be required here")
def test_what_cannot_be_met_is_one_sentence_at_start(tmp_path: Path, flags: list[str], says: str) -> None:
    command = [sys.executable, "-m", "pdx.daemon.main", f"--run-dir={tmp_path / 'run'}", "--arena=4MiB", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pdxd: ")]
    assert line.startswith(f"pdxd: {says}")


def test_an_engine_is_not_served_by_a_daemon_of_other_lanes(fleet: Fleet) -> None:
    daemon = fleet.daemon()
    engine = fleet.engine(daemon, "P")
    hello = Attach(kind="scheduler", engine=msgspec.structs.replace(engine.info, engine_id="Q"))
    for changes, says in (({"transport": "nixl"}, "without transport nixl: it has tcp"),
                          ({"require_rdma": True}, "without require_rdma: it has tcp"),
                          ({"host": "10.0.0.9"}, r"without host 10\.0\.0\.9: it has host 127\.0\.0\.1")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            DaemonClient.attach(msgspec.structs.replace(daemon.config, **changes), hello, start=False)
