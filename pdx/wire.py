"""Every message pdx processes exchange, with its version. tests/golden pins their bytes.

A frame is b"PDX", one version byte, then one MessagePack map tagged by "type". The version is checked before the
body is decoded. Conversations, each with its own union so that a socket decodes only what may arrive on it:

    ATTACH   engine or tool -> pdxd on a Unix socket (the arena's file descriptor comes back)
    ENGINE   engine or tool -> pdxd    TO_ENGINE  the way back      ZeroMQ over ipc; a worker says its part of it
             (FILLED, LET_GO) on the Unix socket of its ATTACH
    PEER     pdxd <-> pdxd      ZeroMQ over tcp; bytes of KV never travel here
    NOTICE   what a lane delivers after a put's bytes have landed
    ROUTER   pdxd -> router     TO_DAEMON  router -> pdxd      ZeroMQ over tcp

An operator's verbs (`verbs`) come to pdxd from tools, as ENGINE, and from routers, as TO_DAEMON.

Durations are seconds on the reader's own clock; `*_ns` are the sender's monotonic clock, for timelines only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from pdx import __version__
from pdx.errors import VersionMismatch, WireError
from pdx.layout import PageLayout, Place
from pdx.members import Budgets as Budgets
from pdx.members import DaemonRef as DaemonRef
from pdx.members import EngineInfo as EngineInfo
from pdx.members import LaneOffer as LaneOffer
from pdx.members import Role as Role
from pdx.verbs import BlockHash, Space, Steer, Tenant

WIRE_VERSION = 4
MAGIC = b"PDX"
# 1 M tokens in 16-token blocks are 65,536 hashes of 32 bytes: 2 MiB, twice over for places.
FRAME_BYTES_MAX = 8 << 20
BLOCKS_MAX = 1 << 17  # that one message names: what answers it, 43 bytes a block and less, finds room in a frame too

# What is added up: sums of such numbers stay far below what MessagePack can carry.
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
# A time, or what is kept beside times in arrays of 64 signed bits.
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
# A measurement. Bounded so that it is a number: no NaN, no infinity.
Measured = Annotated[float, msgspec.Meta(ge=0, lt=1e18)]
# Why something ended. Who says it cuts it short (`shortened`): it is kept for long, and forwarded with more before it.
REASON_CHARS_MAX = 512
Reason = Annotated[str, msgspec.Meta(max_length=4 * REASON_CHARS_MAX)]
# Stands in a reason that says nothing about the daemons, or what lies between them: the next request may fare better.
ONE_REQUEST = "this request only: "
Epoch = Annotated[str, msgspec.Meta(max_length=64, pattern="^[0-9a-f]*$")]  # as in keys.ContentFingerprint


class Message(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Base of all messages: frozen, tagged with the class name in snake case, unknown fields refused."""


# --- ATTACH ---------------------------------------------------------------------------------------------------


class Attach(Message, tag="attach", frozen=True):
    kind: Literal["scheduler", "worker", "tool"]
    engine: EngineInfo | None = None  # scheduler and worker
    pages: PageLayout | None = None  # worker
    rank: int = 0  # worker: which one of engine.layout.ranks
    router: str = ""  # where this engine wants to be announced, with commas between several; scheduler


class Attached(Message, tag="attached", frozen=True):
    """The arena's descriptor rides beside this message when `kind` was "worker"."""

    daemon: DaemonRef
    session: int  # with the daemon's incarnation: this client's ZeroMQ identity, see `identity_of`
    socket: str  # ipc endpoint of the ENGINE conversation
    arena_bytes: int
    fence_offset: int  # the u64 in the control page where this worker publishes its last finished step
    digest_mode: bool
    lease_s: float


def identity_of(incarnation: int, session: int) -> bytes:
    """A client's ZeroMQ identity. A client of a daemon that has died can't be taken for one of its successor's."""
    return f"{incarnation}/{session}".encode()


class AttachRefused(Message, tag="attach_refused", frozen=True):
    reason: str


# --- ENGINE ---------------------------------------------------------------------------------------------------


class OpenSend(Message, tag="open_send", frozen=True):
    """A request that will be prefilled here and decoded elsewhere. Sent once, before its first forward."""

    request_id: str
    handle: str
    block_hashes: list[BlockHash]  # full blocks of the prompt, in order
    prompt_tokens: int
    tail_hash: bytes  # keys.tail_hash of the tokens after the last full block; empty: no tail
    tenant: Tenant = b""


class FilledEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    handoff_id: bytes
    blocks: list[Count]


class Filled(Message, tag="filled", frozen=True):
    """A worker has copied one layer of these blocks into their slots (checksums are in the slot headers).

    Of several ranks each speaks of the layers of its own shard, as the slot counts them.
    """

    step: Count
    step_started_ns: Nanoseconds
    layer: Count
    filled_ns: Nanoseconds
    entries: list[FilledEntry]


class OpenLoad(Message, tag="open_load", frozen=True):
    """A request with a handle reached the decode engine: what of its prompt is, or will be, in the arena?"""

    request_id: str
    handle: str
    block_hashes: list[BlockHash]
    prompt_tokens: int
    tail_hash: bytes
    # It came beside prefill's request: "wait" until the first page has landed, and the answer then comes by itself.
    early: bool = False
    tenant: Tenant = b""


class LookUp(Message, tag="look_up", frozen=True):
    """A request without a handle: how many of its leading blocks are in the arena? Answered at once by LoadOpened."""

    request_id: str
    handoff_id: bytes  # chosen by the engine: names this load as a handoff's id names its own
    block_hashes: list[BlockHash]
    tenant: Tenant = b""
    tokens_per_s: Measured = 0.0  # at which this engine computes prompts; 0: not known yet


class Keep(Message, tag="keep", frozen=True):
    """The engine will have these full blocks, whole. Answered at once: SendOpened with places, or SendEnded."""

    request_id: str
    handoff_id: bytes  # chosen by the engine
    block_hashes: list[BlockHash]
    tenant: Tenant = b""
    # The handoff by which the request came: these blocks follow those that its OpenLoad named and was kept of it since.
    origin: bytes = b""


class Finished(Message, tag="finished", frozen=True):
    """The request that came by this handoff is over: it names no more blocks to keep."""

    handoff_id: bytes


class LetGo(Message, tag="let_go", frozen=True):
    """The engine's side of `handoff_id` is over. No step after `fence` touches its slots.

    Answers SendEnded and LoadEnded, and is sent unasked when a request finishes, aborts or has loaded. From a worker it
    is one rank's word, and counts with the words of all others; from the scheduler it is the engine's.
    """

    handoff_id: bytes
    side: Literal["send", "load"]
    fence: int
    ok: bool
    reason: str = ""
    pages: Count = 0  # pages copied and verified
    done_ns: Nanoseconds = 0
    seconds: Measured = 0.0  # load: which its pages took to come out of the arena, other loads' not counted
    spoilt: list[int] = []  # load: which of the places told held a page with a wrong checksum or digest


class Renew(Message, tag="renew", frozen=True):
    """These handoffs' requests still live in this engine."""

    handoff_ids: list[bytes]
    running: int = 0
    waiting: int = 0
    tokens_per_s: Measured = 0.0  # at which this engine computes prompts; 0: not known yet


class WeightEpoch(Message, tag="weight_epoch", frozen=True):
    """From the scheduler: its engine has other weights. All that it holds ends; what it asks next is of this epoch."""

    epoch: Epoch


class Reset(Message, tag="reset", frozen=True):
    """From the scheduler: clear all blocks of this engine's kind, as they are named in this epoch."""

    epoch: Epoch


class SendOpened(Message, tag="send_opened", frozen=True):
    """One claim for the whole prompt stands. `places[i]` is None where the store holds block i already."""

    request_id: str
    handoff_id: bytes
    places: list[Place | None]  # full blocks, then the tail if there is one


class SendEnded(Message, tag="send_ended", frozen=True):
    """Save no more pages for this handoff; answer LetGo. Also the reply to an OpenSend that can't be served."""

    request_id: str
    handoff_id: bytes
    reason: str


class LoadOpened(Message, tag="load_opened", frozen=True):
    """The answer to OpenLoad and LookUp. "wait": ask again, the handoff waits. "absent": compute it yourself."""

    request_id: str
    handoff_id: bytes
    status: Literal["granted", "wait", "absent"]
    places: list[Place] = []  # leading blocks of the prompt, the tail last if it is among them
    reason: str = ""


class LoadEnded(Message, tag="load_ended", frozen=True):
    """The rest of this handoff will not come; answer LetGo. Layers that have landed stay readable until then."""

    handoff_id: bytes
    reason: str


# --- PEER -----------------------------------------------------------------------------------------------------


class PeerMessage(Message, frozen=True):
    """Any mismatch of these four is dropped and counted, never answered."""

    handoff_id: bytes
    attempt: int
    lease_epoch: int  # the receiver's number for its grant; 0 before GRANT
    incarnation: int  # of the sending daemon


class Reserve(PeerMessage, tag="reserve", frozen=True):
    handle: str  # names both daemons
    namespace: bytes
    layout_id: str
    pages: PageLayout
    block_hashes: list[BlockHash]
    tail_hash: bytes
    lane: str  # the scheme by which the sender will put: the window is opened there; "local" within one daemon
    tenant: Tenant = b""
    spare: bool = False  # no request waits for it: granted at once or refused, and cache when it has landed


class Grant(PeerMessage, tag="grant", frozen=True):
    has: list[int]  # blocks the receiver holds ready and has leased: not to be sent
    wanted: list[int]
    places: list[Place]  # of `wanted`, in the receiver's arena
    window: Annotated[int, msgspec.Meta(ge=0)]  # the lane window that admits puts into `places`


class Wait(PeerMessage, tag="wait", frozen=True):
    ahead: int  # reservations before this one


class Refuse(PeerMessage, tag="refuse", frozen=True):
    reason: Reason


class Commit(PeerMessage, tag="commit", frozen=True):
    pages: int  # how many the sender has put
    checksum: int  # xxh3-64 over the page checksums, by block, then layer


class Committed(PeerMessage, tag="committed", frozen=True):
    """The receiver holds every page and has checked the checksum of checksums."""


class Alive(PeerMessage, tag="alive", frozen=True):
    """The request still lives in the prefill engine, which has not come to its next pages: no silence, no failure."""


class Fail(PeerMessage, tag="fail", frozen=True):
    reason: Reason


class Cancel(PeerMessage, tag="cancel", frozen=True):
    """Stop posting puts. When the last one has ended is the lane's to say, by the window's end."""

    reason: Reason


# --- NOTICE ---------------------------------------------------------------------------------------------------


class Landed(Message, tag="landed", frozen=True):
    handoff_id: bytes
    attempt: int
    lease_epoch: int
    layer: int
    blocks: list[int]
    checksums: bytes  # 8 bytes a block
    digests: bytes  # 32 bytes a block, or empty


# --- ROUTER ---------------------------------------------------------------------------------------------------


class EngineLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    engine_id: str
    waiting: int = 0
    tokens_per_s: Measured = 0.0  # at which it computes prompts; 0: not measured yet


class LinkRate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How fast this daemon's puts reach a peer."""

    daemon_id: str
    bytes_per_s: Measured


class Announce(Message, tag="announce", frozen=True):
    """Everything a daemon serves, sent every ANNOUNCE_S and at once on change. An engine left out has left."""

    daemon: DaemonRef
    engines: list[EngineInfo]
    loads: list[EngineLoad] = []
    links: list[LinkRate] = []
    reservations_waiting: int = 0
    holdings: Count = 0  # messages of that name sent to this router since the last one numbered 0
    leaving: bool = False


HOLDINGS_NAMES_MAX = 8192
ARENA_BIT, DISK_BIT = 1, 2


class Holdings(Message, tag="holdings", frozen=True):
    """Which blocks a daemon keeps, and which it no longer keeps. Numbered from 0, which begins anew: nothing that was
    told before holds. Who misses a number says RESYNC."""

    daemon_id: str
    incarnation: int
    number: Count
    names: Annotated[bytes, msgspec.Meta(max_length=8 * HOLDINGS_NAMES_MAX)]  # keys.short_names, big-endian
    tiers: Annotated[bytes, msgspec.Meta(max_length=HOLDINGS_NAMES_MAX)]  # a byte each, of bits; 0: nowhere any more


class HandoffFailed(Message, tag="handoff_failed", frozen=True):
    """One side of a handoff has failed: a router that still waits for prefill need not wait any longer."""

    handoff_id: bytes
    attempt: int
    reason: Reason


class Welcome(Message, tag="welcome", frozen=True):
    """The router's answer to Announce: proof for the daemon that somebody listens."""

    warnings: list[str] = []


class Resync(Message, tag="resync", frozen=True):
    """The router has missed some HOLDINGS, or had none of this daemon: tell all anew."""


class Share(Message, tag="share", frozen=True):
    """These leading blocks of a prompt are worth having at a peer: put those that the arena has into the peer's."""

    to: DaemonRef
    engine: str  # of the peer, whose blocks they could be
    space: Space
    block_hashes: list[BlockHash]
    tenant: Tenant = b""


class CancelHandoff(Message, tag="cancel_handoff", frozen=True):
    """The client left or the pair failed: end this handoff on your side."""

    handoff_id: bytes
    attempt: int
    reason: Reason


# --- ENGINE from tools, TO_DAEMON from routers -------------------------------------------------------------------


class Ask(Message, tag="ask", frozen=True):
    """A question to the daemon, or a verb that steers what it keeps. Routers ask too, with numbers of their own."""

    verb: Literal["stats", "health", "trace", "check", "spaces", "view", "course"] | Steer
    handoff_id: bytes = b""  # trace, course
    number: Count = 0


class Answer(Message, tag="answer", frozen=True):
    """`body` is the verb's result (see `verbs`); `error` says in one sentence why there is none."""

    number: Count = 0
    body: dict[str, Any] = {}
    error: str = ""


ATTACH = Attach
TO_ATTACH = Attached | AttachRefused
ENGINE = OpenSend | Filled | OpenLoad | LookUp | Keep | Finished | LetGo | Renew | WeightEpoch | Reset | Ask
TO_ENGINE = SendOpened | SendEnded | LoadOpened | LoadEnded | Answer
PEER = Reserve | Grant | Wait | Refuse | Commit | Committed | Alive | Fail | Cancel
NOTICE = Landed
ROUTER = Announce | Holdings | HandoffFailed | Answer
TO_DAEMON = Welcome | Resync | Share | CancelHandoff | Ask

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return MAGIC + bytes((WIRE_VERSION,)) + _encoder.encode(message)


def shortened(reason: str) -> str:
    """Its beginning, which says where it came from."""
    return reason[:REASON_CHARS_MAX]


def version() -> str:
    """As every program of pdx tells it. Those of one wire version understand each other."""
    return f"pdx {__version__}, wire {WIRE_VERSION}"


def decoder_of(union: Any) -> Callable[[bytes | memoryview], Any]:
    """A function from frame to message for one conversation. It raises WireError or VersionMismatch, nothing else."""
    body_decoder = msgspec.msgpack.Decoder(union)

    def decode(frame: bytes | memoryview) -> Any:
        if len(frame) > FRAME_BYTES_MAX:
            raise WireError(f"frame of {len(frame)} bytes is over the limit of {FRAME_BYTES_MAX}")
        if len(frame) < 5 or bytes(frame[:3]) != MAGIC:
            raise WireError("not a pdx frame")
        if frame[3] != WIRE_VERSION:
            raise VersionMismatch(f"peer speaks wire version {frame[3]}, this side {WIRE_VERSION}")
        try:
            return body_decoder.decode(memoryview(frame)[4:])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise WireError(f"malformed {getattr(union, '__name__', 'message')}: {error}") from error

    return decode
