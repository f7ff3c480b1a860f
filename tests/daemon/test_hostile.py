"""Random and mutated messages on every socket of a real pdxd: it survives, counts them, and leaks nothing."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from daemon.fleet import PAGES, QUICK, BareEngine, Daemon, Fleet, fleet_in, prompt_of

from pdx.curve import lock
from pdx.handoff.handle import TransferHandle, mint
from pdx.keys import ContentFingerprint, LayoutFingerprint, layout_id, namespace_of
from pdx.layout import Place
from pdx.transport.api import Span
from pdx.transport.frames import Head, encode_frame_start
from pdx.transport.handshake import greet_as_connector
from pdx.wire import (
    MAGIC,
    WIRE_VERSION,
    Alive,
    Ask,
    Cancel,
    Commit,
    Committed,
    DaemonRef,
    Fail,
    Filled,
    FilledEntry,
    Finished,
    Grant,
    Keep,
    Landed,
    LaneOffer,
    LetGo,
    Message,
    OpenLoad,
    OpenSend,
    Refuse,
    Renew,
    Reserve,
    SendEnded,
    Wait,
    encode,
)

ROUNDS, MESSAGES_A_ROUND = 40, 150
NUMBERS = [0, 1, -1, 2, 3, 7, 2**16, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**63, 2**64 - 1]
SCRAPS: list[Any] = [
    *NUMBERS, None, True, 0.5, float("nan"), "", "x", "é" * 9, b"", b"\xff" * 16, [], {}, [[]], [-1], [2**64 - 1]
]  # fmt: skip


class HostilePeer:
    """A process that holds the cluster key and says anything: a daemon's control and lane connections, by hand."""

    def __init__(self, fleet: Fleet, victim: Daemon) -> None:
        self.key = fleet.key_file.read_bytes()
        self._context = zmq.Context()
        self.ears = self._context.socket(zmq.ROUTER)
        lock(self.ears, self.key, server=True)
        self.ears.bind("tcp://127.0.0.1:0")
        self.mouth = self._context.socket(zmq.DEALER)
        lock(self.mouth, self.key, server=False)
        self.mouth.connect(victim.ref.control)
        control = self.ears.getsockopt_string(zmq.LAST_ENDPOINT)
        # Its lane leads nowhere: puts towards it fail, one after the other.
        self.ref = DaemonRef(
            daemon_id="hostile", incarnation=7, control=control, lanes=[LaneOffer(endpoint="tcp://127.0.0.1:9")]
        )
        self._victim = victim

    def say(self, frame: bytes) -> None:
        self.mouth.send(frame)

    def answer(self, handoff_id: bytes) -> dict[str, Any]:
        """What the daemon says to our RESERVE."""
        while True:
            assert self.ears.poll(5000), "no answer to RESERVE"
            body = msgspec.msgpack.decode(self.ears.recv_multipart()[-1][4:])
            if body["type"] in ("grant", "wait", "refuse") and body["handoff_id"] == handoff_id:
                return dict(body)

    @contextlib.contextmanager
    def lane(self) -> Iterator[socket.socket]:
        host, port = self._victim.ref.lanes[0].endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            greet_as_connector(connection, self.key)
            yield connection

    def close(self) -> None:
        self.ears.close(0)
        self.mouth.close(0)
        self._context.term()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[tuple[Fleet, Daemon, BareEngine, HostilePeer]]:
    with fleet_in(tmp_path) as fleet:
        daemon = fleet.daemon(lease_s="0.5", linger_s="60")
        peer = HostilePeer(fleet, daemon)
        yield fleet, daemon, fleet.engine(daemon, "E"), peer
        peer.close()


def fingerprints() -> tuple[bytes, str]:
    content = ContentFingerprint(
        model="m", weights="w", weight_epoch="", dtype="bf16", block_tokens=16, hash_algorithm="sha"
    )
    layout = LayoutFingerprint(
        engine="bare 1", attention="none", layers=PAGES.layers, page_bytes=PAGES.page_bytes, block_tokens=16,
        packing="L", kv_groups=1, ranks=1, chunk_blocks=PAGES.chunk_blocks,
    )  # fmt: skip
    return namespace_of(content), layout_id(layout)


def handle_between(fleet: Fleet, prefill: DaemonRef, decode: DaemonRef, handoff_id: bytes) -> str:
    handle = TransferHandle(
        handoff_id=handoff_id, attempt=1, prefill_engine="E", decode_engine="E", prefill_daemon=prefill,
        decode_daemon=decode, budgets=QUICK, issued_unix_s=time.time(),
    )  # fmt: skip
    return mint(handle, fleet.key_file.read_bytes())


def reserve_of(handle: str, ids: dict[str, Any], tokens: int, seed: int, *, spare: bool = False) -> Reserve:
    namespace, layout = fingerprints()
    prompt = prompt_of(tokens, seed)
    return Reserve(
        **ids, handle=handle, namespace=namespace, layout_id=layout, pages=PAGES, block_hashes=prompt.hashes,
        tail_hash=prompt.tail, lane="tcp", spare=spare,
    )  # fmt: skip


def bent(message: Message, chance: random.Random) -> bytes:
    """The frame of a message with one field changed for another value, one byte flipped, or cut short."""
    way = chance.random()
    if way < 0.15:
        frame = bytearray(encode(message))
        for _ in range(chance.randint(1, 4)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        return bytes(frame)
    if way < 0.2:
        return encode(message)[: chance.randrange(40)]
    body: Any = msgspec.msgpack.decode(encode(message)[4:])
    _bend(body, chance)
    return MAGIC + bytes((WIRE_VERSION,)) + msgspec.msgpack.encode(body)


def _bend(node: Any, chance: random.Random) -> None:
    """Replaces something at a random depth, mostly by something of its own type."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = chance.choice([k for k in keys if k != "type"] or keys)
    value = node[key]
    if isinstance(value, dict | list) and value and chance.random() < 0.7:
        _bend(value, chance)
    elif isinstance(value, bool):
        node[key] = not value
    elif isinstance(value, int) and chance.random() < 0.9:
        node[key] = chance.choice(NUMBERS)
    elif isinstance(value, list) and chance.random() < 0.8:
        node[key] = chance.choice([value * 2, value[::-1], value[1:], value[:1] * 70, []])
    elif isinstance(value, str) and chance.random() < 0.8:
        node[key] = chance.choice(["send", "load", "worker", "stats", "trace", "x" * 5000, ""])
    else:
        node[key] = chance.choice(SCRAPS)


def send_frames(
    connection: socket.socket, notice: bytes, window: int, places: list[Any], chance: random.Random
) -> None:
    """Puts by a peer that was granted `window`: right, outside its places, cut short, or no frames at all."""
    way = chance.random()
    if way < 0.1:
        connection.sendall(os.urandom(chance.randrange(1, 200)))
        return
    spans = []
    if places and way < 0.8:
        place = Place(*chance.choice(places))
        spans = [Span(place.page_offset(PAGES, chance.randrange(PAGES.layers)), PAGES.page_bytes)]
    if way > 0.7:
        spans.append(Span(chance.choice([0, 4096, 2**40, 2**63]), 64))
    payload = sum(span.length for span in spans)
    window = window if way < 0.9 else chance.getrandbits(64)
    head = Head(True, window, 1, len(spans), payload, len(notice))
    connection.sendall(encode_frame_start(head, spans) + bytes(payload) + notice)


def peer_messages(out_ids: dict[str, Any], in_ids: dict[str, Any], blocks: int, pages: int) -> list[Message]:
    """All that a peer says in a handoff after its RESERVE, in either role."""
    places = [Place(4096 * n, 1, 0, 4096, 1) for n in range(blocks)]
    return [
        Grant(**out_ids, has=[], wanted=list(range(blocks)), places=places, window=5),
        Wait(**out_ids, ahead=1),
        Refuse(**out_ids, reason="no"),
        Committed(**out_ids),
        Cancel(**out_ids, reason="c"),
        Commit(**in_ids, pages=pages, checksum=1),
        Alive(**in_ids),
        Fail(**in_ids, reason="f"),
    ]


def test_a_prompt_with_a_block_twice_is_refused(scene: tuple[Fleet, Daemon, BareEngine, HostilePeer]) -> None:
    """From a peer and from an engine of this host."""
    fleet, daemon, engine, peer = scene
    prompt, handoff_id = prompt_of(32), os.urandom(16)
    prompt.hashes[1] = prompt.hashes[0]
    ids = {"handoff_id": handoff_id, "attempt": 1, "lease_epoch": 0, "incarnation": 7}
    reserve = reserve_of(handle_between(fleet, peer.ref, daemon.ref, handoff_id), ids, 32, 0)
    peer.say(encode(msgspec.structs.replace(reserve, block_hashes=prompt.hashes)))
    assert peer.answer(handoff_id)["type"] == "refuse"
    engine.ask_send(prompt, handle_between(fleet, daemon.ref, peer.ref, os.urandom(16)))
    assert "once" in engine.expect(SendEnded).reason
    daemon.wait_unleased()


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_that_is_said_to_it_ends_a_daemon(
    scene: tuple[Fleet, Daemon, BareEngine, HostilePeer], seed: int
) -> None:
    fleet, daemon, engine, peer = scene
    chance = random.Random(seed)
    print(f"seed {seed}")
    for number in range(ROUNDS):
        out_id, in_id = chance.randbytes(16), chance.randbytes(16)
        tokens = chance.choice([1, 16, 40, 70])
        prompt = prompt_of(tokens, seed=number % 5)
        names = len(prompt.names)
        # One handoff to the hostile peer, one from it, one inside the daemon.
        outgoing = handle_between(fleet, daemon.ref, peer.ref, out_id)
        incoming = handle_between(fleet, peer.ref, daemon.ref, in_id)
        inside = handle_between(fleet, daemon.ref, daemon.ref, chance.randbytes(16))
        in_ids = {"handoff_id": in_id, "attempt": 1, "lease_epoch": 0, "incarnation": 7}
        peer.say(encode(reserve_of(incoming, in_ids, tokens, number % 5)))
        answer = peer.answer(in_id)
        window, places, epoch = answer.get("window", 0), answer.get("places", []), answer["lease_epoch"]
        engine.ask_send(prompt, outgoing)
        engine.ask_send(prompt, inside)
        in_ids["lease_epoch"] = epoch
        out_ids = {"handoff_id": out_id, "attempt": 1, "lease_epoch": 3, "incarnation": 7}
        blocks = list(range(names))
        own_ids = {**in_ids, "incarnation": daemon.ref.incarnation}
        peer_says = [
            *peer_messages(out_ids, in_ids, names, len(places) * PAGES.layers),
            reserve_of(incoming, in_ids, tokens, number),
            reserve_of(incoming, in_ids, tokens, number, spare=True),
            reserve_of(inside, own_ids, tokens, 0),
        ]
        entry = FilledEntry(handoff_id=chance.choice([out_id, in_id]), blocks=blocks)
        about = {"request_id": "r", "block_hashes": prompt.hashes, "prompt_tokens": tokens, "tail_hash": prompt.tail}
        engine_says: list[Message] = [
            OpenSend(handle=outgoing, **about),
            OpenLoad(handle=incoming, **about),
            OpenLoad(handle=inside, **about),
            *(
                Filled(step=1, step_started_ns=1, layer=layer, filled_ns=1, entries=[entry])
                for layer in range(PAGES.layers)
            ),
            Keep(request_id="k", handoff_id=out_id, block_hashes=prompt.hashes, origin=in_id),
            Finished(handoff_id=in_id),
            LetGo(handoff_id=out_id, side="send", fence=0, ok=True),
            LetGo(handoff_id=in_id, side="load", fence=0, ok=False),
            Renew(handoff_ids=[out_id, in_id], running=1, waiting=1),
            Ask(verb="stats"),
        ]
        notice = Landed(
            handoff_id=in_id, attempt=1, lease_epoch=epoch, layer=0, blocks=blocks, checksums=bytes(8 * names),
            digests=b"",
        )  # fmt: skip
        with peer.lane() as lane, contextlib.suppress(OSError):
            for _ in range(MESSAGES_A_ROUND):
                way = chance.random()
                if way < 0.4:
                    peer.say(bent(chance.choice(peer_says), chance))
                elif way < 0.9:
                    source = engine.scheduler if chance.random() < 0.5 else engine.worker
                    source._socket.send(bent(chance.choice(engine_says), chance), zmq.DONTWAIT)
                else:
                    bytes_of_notice = bent(notice, chance) if chance.random() < 0.5 else encode(notice)
                    send_frames(lane, bytes_of_notice, window, places, chance)
        engine.scheduler.poll()
        assert daemon.process.poll() is None, (daemon.run_dir / "log").read_text()[-3000:]
    counters = daemon.stats()["counters"]
    assert counters["bad_frames"] > 100, counters
    engine.close()
    daemon.wait_unleased()
