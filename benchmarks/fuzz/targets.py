"""Every decoder that takes bytes from outside: what right frames look like, and what it may raise. See mutate."""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from benchmarks.fuzz.bodies import ANSWERS, CHAT_SEED, ENGINE, OPERATORS, REQUESTS, SEED
from benchmarks.fuzz.mutate import bent, mutated
from benchmarks.harness.rig import REPOSITORY
from pdx import admin, wire
from pdx.errors import HandleError, Refused, WireError
from pdx.handoff.handle import TransferHandle, peek, verify
from pdx.router.choice.knowledge import Knowledge
from pdx.router.choice.prompts import Prompts
from pdx.router.request import seedable, servable
from pdx.router.request.prefill_reply import PrefillReply
from pdx.router.request.usage import Cached, EventStream, with_cached
from pdx.transport import frames
from pdx.transport.api import Span
from pdx.transport.link_messages import Ask, Bye, Drained, Granted, Landed, MessageStream, Shut, Unknown, encode

KEY = b"fuzz" * 8
PROMPTS = Prompts(cast(Any, None), Knowledge())
CONVERSATIONS = ("ATTACH", "TO_ATTACH", "ENGINE", "TO_ENGINE", "PEER", "NOTICE", "ROUTER", "TO_DAEMON")


@dataclass(frozen=True)
class Target:
    """`feed` returns, or raises one of `may_raise`; anything else is a finding.

    Where frames hold a value, `values` are those of the seeds, and `framed` makes a frame of one.
    """

    name: str
    seeds: tuple[bytes, ...]
    feed: Callable[[bytes], object]
    may_raise: tuple[type[Exception], ...] = ()
    values: tuple[Any, ...] = ()
    framed: Callable[[Any], bytes] = msgspec.json.encode

    def frame(self, rng: random.Random) -> bytes:
        if self.values and rng.random() < 0.5:
            value = rng.choice(self.values)
            for _ in range(rng.choice((1, 1, 2, 3))):
                value = bent(rng, value)
            return self.framed(value)
        return mutated(rng, self.seeds)


def targets() -> list[Target]:
    return [*_of_lanes(), *_of_wire(), _of_handles(), *_of_http()]


def _of_lanes() -> Iterable[Target]:
    head = frames.Head(True, 7, 1, 2, 300, 5)
    start = frames.encode_frame_start(head, [Span(0, 100), Span(4096, 200)])
    spans = start[frames.HEAD_BYTES :]
    greetings = tuple(
        frames.encode_greeting(frames.Greeting(kind, True, bytes(32))) for kind in (frames.HELLO, frames.PROOF)
    )
    refused = (WireError,)
    yield Target("tcp head", (start[: frames.HEAD_BYTES],), frames.decode_head, refused)
    yield Target("tcp spans", (spans, spans[::-1]), lambda data: frames.decode_spans(data, head), refused)
    yield Target("tcp frame", (start,), _frame, refused)
    yield Target("greeting", greetings, lambda data: frames.decode_greeting(data, kind=frames.HELLO), refused)
    said = (
        Ask(1), Granted(2, 4096, 100, "DRAM", 0, [Span(0, 10), Span(50, 50)], b"key"), Unknown(3), Landed(4, b"notice"),
        Shut(5), Drained(6), Bye(),
    )  # fmt: skip
    whole = tuple(encode(message) for message in said)
    yield Target(
        "link", (*whole, b"".join(whole)), lambda data: MessageStream().feed(data), refused,
        values=tuple(msgspec.msgpack.decode(frame[4:]) for frame in whole), framed=_linked,
    )  # fmt: skip


def _linked(value: Any) -> bytes:
    body = msgspec.msgpack.encode(value)
    return len(body).to_bytes(4, "little") + body


def _frame(data: bytes) -> object:
    """As a connection reads it: the spans of whatever head there is."""
    head = frames.decode_head(data[: frames.HEAD_BYTES])
    rest = data[frames.HEAD_BYTES :]
    return frames.decode_spans(rest[: head.span_count * frames.SPAN_BYTES], head)


def _of_wire() -> Iterable[Target]:
    """Each conversation has its decoder, and gets its own messages, and as many of others."""
    golden = [path.read_bytes() for path in sorted((REPOSITORY / "tests" / "golden" / "wire").glob("*.bin"))]
    for name in CONVERSATIONS:
        decode = wire.decoder_of(getattr(wire, name))
        own = [frame for frame in golden if _decodes(decode, frame)]
        yield Target(
            f"wire {name}",
            (*own, *[frame for frame in golden if frame not in own][: len(own)]),
            decode,
            (WireError,),
            values=tuple(msgspec.msgpack.decode(frame[4:]) for frame in own),
            framed=lambda value: wire.MAGIC + bytes((wire.WIRE_VERSION,)) + msgspec.msgpack.encode(value),
        )


def _decodes(decode: Callable[[bytes], object], frame: bytes) -> bool:
    try:
        decode(frame)
    except WireError:
        return False
    return True


def _of_handles() -> Target:
    """The body of one whose signature nobody looks at, and the same as somebody without the key would bring it."""
    daemon = wire.DaemonRef(
        daemon_id="d",
        incarnation=1,
        control="tcp://127.0.0.1:1",
        lanes=[wire.LaneOffer(endpoint="tcp://127.0.0.1:2", devices=["mlx5_0"])],
    )
    handle = TransferHandle(
        handoff_id=bytes(16), attempt=1, prefill_engine="P", decode_engine="D", prefill_daemon=daemon,
        decode_daemon=daemon, budgets=wire.Budgets(), issued_unix_s=1000.0,
    )  # fmt: skip

    def feed(body: bytes) -> None:
        text = base64.urlsafe_b64encode(bytes(32) + body).decode()
        try:
            verify(text, KEY, now_unix_s=1000.0)
        except HandleError:
            peek(text)
            return
        raise AssertionError("a handle without a signature was taken")

    body = msgspec.msgpack.encode(handle)
    return Target(
        "handle", (body,), feed, (HandleError,), values=(msgspec.msgpack.decode(body),), framed=msgspec.msgpack.encode
    )


def _of_http() -> Iterable[Target]:
    requests = tuple(msgspec.json.encode(body) for body in REQUESTS)
    yield Target("client's request", requests, _request, values=REQUESTS)
    answers = tuple(msgspec.json.encode(answer) for answer in ANSWERS)
    yield Target("prefill's answer", answers, PrefillReply.read, values=ANSWERS)
    yield Target(
        "decode's answer", answers,
        lambda body: (SEED.merged(body), CHAT_SEED.merged(body), with_cached(body, Cached(3, 1))), values=ANSWERS,
    )  # fmt: skip
    events = tuple(b"data: " + answer + b"\n\n" for answer in answers)
    yield Target(
        "decode's stream", (*events, b"".join(events) + b"data: [DONE]\n\n"), _stream, values=ANSWERS,
        framed=lambda value: b"data: " + msgspec.json.encode(value) + b"\n\n",
    )  # fmt: skip
    admins = tuple(msgspec.json.encode(body) for body in OPERATORS)
    kinds = (admin.LookupRequest, admin.PinRequest, admin.UnpinRequest, admin.ClearRequest)
    yield Target("operator's request", admins, lambda body: [_operator(body, kind) for kind in kinds], values=OPERATORS)
    yield Target("engine's tokens", (b'{"tokens":[1,2,3],"count":3}',), admin.tokens_in, (Refused,))
    yield Target("engine's error", (b'{"error":{"message":"no"}}',), admin.reason_in)


def _operator(body: bytes, kind: type[Any]) -> object:
    try:
        return admin.parsed(body, kind)
    except Refused:
        return None


def _request(raw: bytes) -> None:
    """What the router does with a body, in its order."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    if not isinstance(body, dict):
        return
    for path in servable.PAIRED:
        public, _ = servable.without_private(body)
        servable.output_limit(path, public)
        if servable.alone_reason(path, public) is not None:
            continue
        servable.prefill_body(path, public, "handle")
        servable.early_body(public, "handle")
        reading = PROMPTS.ask(path, public, "m", (), turn=0, headers={})
        if reading is not None:
            with contextlib.suppress(StopIteration):  # with no engines there is nobody to wait for
                PROMPTS.read(reading, 0.0).send(None)
        if path in servable.WITH_IDS:
            servable.decode_body(path, public, "handle", [1, 2])
            if not seedable.unseedable_reason(path, public, ENGINE):
                servable.seeded_body(path, public, "handle", [1, 2], 3)
            SEED.unusable(public.get("stop"))


def _stream(data: bytes) -> None:
    for seed in (None, SEED, CHAT_SEED):
        stream = EventStream(Cached(3, 1), seed)
        half = len(data) // 2
        stream.feed(data[:half])
        stream.feed(data[half:])
        stream.finish()
