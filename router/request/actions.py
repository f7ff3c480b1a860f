"""What a journey hears and what it wants done. The conductor turns calls into events and does the actions, in order."""

from __future__ import annotations

import msgspec

from pdx.router.choice.policy import NOTHING_ASKED, Asked, Candidate, Pair, Snapshot
from pdx.router.choice.prompt import Prompt
from pdx.router.line.admission import TurnedAwayWhy
from pdx.router.request.seed import Seed
from pdx.router.request.usage import Cached

# --- events ---------------------------------------------------------------------------------------------------


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """The start, with all that chance and time have to say about it; comes again when it is a waiting one's turn."""

    snapshot: Snapshot
    behind: frozenset[str] = frozenset()  # needs for which others wait already
    retry_after_s: int = 1  # if nobody can serve now: when somebody may
    turn: int  # of this router, counting requests
    handoff_id: bytes  # 16 random bytes
    now_unix_s: float
    asked: Asked = NOTHING_ASKED


class TurnedAway(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever waits in the line waits in vain."""

    why: TurnedAwayWhy
    retry_after_s: int


class PrefillAnswered(msgspec.Struct, frozen=True):
    status: int
    body: bytes


class PrefillFailed(msgspec.Struct, frozen=True):
    """Prefill's call broke, could not connect or took too long."""

    reason: str
    blames: bool = True  # whether it says that something is wrong with the engine


class HandoffBroke(msgspec.Struct, frozen=True):
    """A daemon said that the handoff has failed while prefill was still awaited. Its words are for logs only."""

    reason: str


class DecodeAnswered(msgspec.Struct, frozen=True):
    """A whole answer, or the first bytes of a stream whose status is `status`."""

    status: int
    body: bytes
    streaming: bool = False
    snapshot: Snapshot | None = None  # who is there now, should it have to be repeated
    retry_after_s: int = 0  # the engine's own word; 0: none


# Not implemented, no such HTTP: what the client wants, which no other engine has either.
NEVER_STATUSES = frozenset((501, 505))
# Neither these nor 503 and 429 say that something is wrong with an engine: vLLM says 503 when its own queue is full
# (--max-num-queued-reqs), and of one that is dead /health says so.
UNJUDGED_STATUSES = NEVER_STATUSES | {429, 503}
# The client's fault, or the engine's own: it has another key or lacks an adapter, or a gateway before it says so.
DOUBTFUL_STATUSES = frozenset((401, 403, 404, 408, 425, 429))


class DecodeFailed(msgspec.Struct, frozen=True):
    """Decode's call broke or could not connect."""

    reason: str
    snapshot: Snapshot | None = None  # who is there now
    words: str = ""  # the engine's own, for the client
    code: int = 0  # the engine's own, if it has said in its stream that it failed
    blames: bool = True  # whether it says that something is wrong with the engine


class StreamFinished(msgspec.Struct, frozen=True):
    pass


class DeadlinePassed(msgspec.Struct, frozen=True):
    pass


class ClientGone(msgspec.Struct, frozen=True):
    pass


Event = (
    Begin
    | TurnedAway
    | PrefillAnswered
    | PrefillFailed
    | HandoffBroke
    | DecodeAnswered
    | DecodeFailed
    | StreamFinished
    | DeadlinePassed
    | ClientGone
)


# --- actions --------------------------------------------------------------------------------------------------


class LineUp(msgspec.Struct, frozen=True):
    """Wait until an engine may have room; then Begin comes again, or TurnedAway."""

    need: str


class CallPrefill(msgspec.Struct, frozen=True, kw_only=True):
    """Begin this call; what comes of it is an event."""

    engine: Candidate
    body: bytes
    timeout_s: float
    prompt: Prompt | None = None  # which it is to compute


class CallDecode(msgspec.Struct, frozen=True, kw_only=True):
    """Begin this call; what comes of it is an event. A former one is over."""

    engine: Candidate
    body: bytes
    cached: Cached | None = None  # prefill's numbers, to be shown in a stream instead of decode's
    seed: Seed | None = None  # the client has this token already, or gets it before decode's
    waits: bool = False  # its answer waits for prefill's
    prompt: Prompt | None = None  # which it is to compute


class DropPrefill(msgspec.Struct, frozen=True):
    """Nobody waits for prefill's answer any more."""


class ShowCached(msgspec.Struct, frozen=True):
    """CallDecode.cached, for a call under way."""

    cached: Cached


class EndHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """CancelHandoff to both daemons."""

    pair: Pair
    handoff_id: bytes
    reason: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer to the client."""

    status: int
    body: bytes
    retry_after_s: int = 0


class Write(msgspec.Struct, frozen=True):
    """These events go to the client's stream, which they open."""

    body: bytes


class PassOn(msgspec.Struct, frozen=True):
    """Stream to the client: these bytes, then all that come from decode."""

    body: bytes


class CloseStream(msgspec.Struct, frozen=True):
    """Write these last bytes to the client and end the stream."""

    body: bytes = b""


Action = (
    LineUp | CallPrefill | CallDecode | DropPrefill | ShowCached | EndHandoff | Answer | Write | PassOn | CloseStream
)
