"""One request's way through the engines, as a pure machine: events in, actions out, time and randomness passed in.

    choosing ── pair ──► prefilling ── prefilled ──► decoding ── first_byte ──► streaming ── finish ──► ended
        │                    └── fall back ──► alone ── first_byte ──┘               └── break ──► ended
        └── alone ──────────────────────────────┘ └── retry ──► retrying (alone, another engine)

Its rules: an error that the client caused (4xx) reaches the client as the engine put it. An error of prefill costs
the handoff, never the request: the chosen decode engine computes the prompt itself. An error of decode before the
first byte is repeated once on another engine. After the first byte nothing can be repeated: the stream ends with an
error event. Whoever leaves early cancels the handoff at both daemons.

A journey belongs to the task that serves its client's connection.
"""

from __future__ import annotations

from typing import Any, Literal, assert_never

import msgspec

from pdx.errors import IllegalTransition
from pdx.handoff.handle import TransferHandle, mint
from pdx.router.policy import Candidate, Pair, PolicyName, Snapshot, choose_alone, choose_pair
from pdx.router.prefill_reply import PrefillReply
from pdx.router.replies import error_body, error_event
from pdx.router.servable import alone_reason, decode_body, prefill_body
from pdx.wire import Budgets

State = Literal["choosing", "prefilling", "decoding", "alone", "retrying", "streaming", "ended"]

RETRY_AFTER_S = 1  # engines join within seconds of their /health answering

MOVES: dict[tuple[State, str], State] = {
    ("choosing", "pair"): "prefilling",
    ("choosing", "alone"): "alone",
    ("choosing", "reject"): "ended",
    ("prefilling", "prefilled"): "decoding",
    ("prefilling", "fall_back"): "alone",
    ("prefilling", "reject"): "ended",
    ("decoding", "first_byte"): "streaming",
    ("decoding", "answer"): "ended",
    ("decoding", "retry"): "retrying",
    ("decoding", "reject"): "ended",
    ("alone", "first_byte"): "streaming",
    ("alone", "answer"): "ended",
    ("alone", "retry"): "retrying",
    ("alone", "reject"): "ended",
    ("retrying", "first_byte"): "streaming",
    ("retrying", "answer"): "ended",
    ("retrying", "reject"): "ended",
    ("streaming", "finish"): "ended",
    ("streaming", "break"): "ended",
    ("prefilling", "leave"): "ended",
    ("decoding", "leave"): "ended",
    ("alone", "leave"): "ended",
    ("retrying", "leave"): "ended",
    ("streaming", "leave"): "ended",
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all journeys of a router."""

    cluster_key: bytes
    policy: PolicyName = "round_robin"
    budgets: Budgets = Budgets()
    prefill_timeout_s: float = 120.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the client asked, without its private fields."""

    path: str
    model: str
    body: dict[str, Any]  # empty for uploads, which only pass through
    raw: bytes  # what one engine alone gets: the body as it came, or encoded anew if something was stripped


# --- events ---------------------------------------------------------------------------------------------------


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """The start, with all that chance and time have to say about it."""

    snapshot: Snapshot
    turn: int  # of this router, counting requests
    handoff_id: bytes  # 16 random bytes
    now_unix_s: float


class PrefillAnswered(msgspec.Struct, frozen=True):
    status: int
    body: bytes


class HandoffBroke(msgspec.Struct, frozen=True):
    """A daemon said that the handoff has failed while prefill was still awaited. Its words are for logs only."""

    reason: str


class DecodeAnswered(msgspec.Struct, frozen=True):
    """A whole answer, or the first bytes of a stream whose status is `status`."""

    status: int
    body: bytes
    streaming: bool = False


class UpstreamFailed(msgspec.Struct, frozen=True):
    """The call under way broke, could not connect or took too long."""

    reason: str


class StreamFinished(msgspec.Struct, frozen=True):
    pass


class DeadlinePassed(msgspec.Struct, frozen=True):
    pass


class ClientGone(msgspec.Struct, frozen=True):
    pass


Event = (
    Begin
    | PrefillAnswered
    | HandoffBroke
    | DecodeAnswered
    | UpstreamFailed
    | StreamFinished
    | DeadlinePassed
    | ClientGone
)


# --- actions --------------------------------------------------------------------------------------------------


class CallPrefill(msgspec.Struct, frozen=True, kw_only=True):
    engine: Candidate
    body: bytes
    timeout_s: float


class CallDecode(msgspec.Struct, frozen=True, kw_only=True):
    engine: Candidate
    body: bytes
    cached_tokens: int | None = None  # prefill's number, to be shown to the client instead of decode's


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


class PassOn(msgspec.Struct, frozen=True):
    """Stream to the client: these bytes, then all that come from upstream."""

    body: bytes


class CloseStream(msgspec.Struct, frozen=True):
    """Write these last bytes to the client and end the stream."""

    body: bytes = b""


Action = CallPrefill | CallDecode | EndHandoff | Answer | PassOn | CloseStream


class Journey:
    """One request. `on(event)` returns what to do next, in order; an event the table forbids changes nothing.

    `outcome` and `reason` are for headers and metrics: what became of the handoff, and why an engine answers alone.
    """

    def __init__(self, request: Request, settings: Settings) -> None:
        self.state: State = "choosing"
        self.reason = ""
        self.outcome = "none"  # "none", "ok", "client_error", or why it failed
        self.prefill: Candidate | None = None
        self.decode: Candidate | None = None
        self.handoff_id = b""
        self._request = request
        self._settings = settings
        self._begin: Begin | None = None
        self._pair: Pair | None = None  # while its handoff may still be under way
        self._handle = ""

    @property
    def paired(self) -> bool:
        """Whether the answer comes, or would have come, from a pair."""
        return bool(self.handoff_id) and not self.reason

    def __repr__(self) -> str:
        engines = [candidate.engine_id for candidate in (self.prefill, self.decode) if candidate]
        return f"<Journey {self.state} {'→'.join(engines) or '-'} {self.reason or self.outcome}>"

    def on(self, event: Event) -> list[Action]:
        match event:
            case Begin():
                return self._choose(event)
            case PrefillAnswered():
                return self._on_prefill(event)
            case HandoffBroke():
                return self._fall_back("handoff_failed")
            case DecodeAnswered():
                return self._on_decode(event)
            case UpstreamFailed():
                return self._on_failure(event.reason)
            case StreamFinished():
                self._move("finish")
                self._settle("ok")
                return [CloseStream()]
            case DeadlinePassed():
                return self._on_deadline()
            case ClientGone():
                self._move("leave")
                return self._end_handoff("client_gone")
            case _:
                assert_never(event)

    # --- choosing ---------------------------------------------------------------------------------------------

    def _choose(self, begin: Begin) -> list[Action]:
        request, policy = self._request, self._settings.policy
        reason = alone_reason(request.path, request.body)
        pair = None if reason else choose_pair(begin.snapshot, request.model, policy=policy, turn=begin.turn)
        if pair is not None:
            self._move("pair")
            self._begin = begin
            return self._call_prefill(pair, begin)
        decode = choose_alone(begin.snapshot, request.model, policy=policy, turn=begin.turn)
        if decode is None:
            self._move("reject")
            self.reason = "no_decode"
            message = f"no decode engine is ready for model {request.model!r}"
            return [Answer(status=503, body=error_body(503, message), retry_after_s=RETRY_AFTER_S)]
        self._move("alone")
        self._begin = begin
        self.reason = reason or "no_pair"
        return [self._call_alone(decode)]

    def _call_prefill(self, pair: Pair, begin: Begin) -> list[Action]:
        self._pair, self.prefill, self.decode = pair, pair.prefill, pair.decode
        self.handoff_id = begin.handoff_id
        handle = TransferHandle(
            handoff_id=begin.handoff_id,
            attempt=0,
            prefill_engine=pair.prefill.engine_id,
            decode_engine=pair.decode.engine_id,
            prefill_daemon=pair.prefill.daemon,
            decode_daemon=pair.decode.daemon,
            budgets=self._settings.budgets,
            issued_unix_s=begin.now_unix_s,
        )
        self._handle = mint(handle, self._settings.cluster_key)
        body = prefill_body(self._request.path, self._request.body, self._handle)
        timeout_s = self._settings.prefill_timeout_s
        return [CallPrefill(engine=pair.prefill, body=msgspec.json.encode(body), timeout_s=timeout_s)]

    def _call_alone(self, engine: Candidate) -> CallDecode:
        self.decode = engine
        return CallDecode(engine=engine, body=self._request.raw)

    # --- prefill ----------------------------------------------------------------------------------------------

    def _on_prefill(self, event: PrefillAnswered) -> list[Action]:
        if 400 <= event.status < 500:
            self._move("reject")
            return [*self._end_handoff("client_error"), Answer(status=event.status, body=event.body)]
        reply = PrefillReply.read(event.body) if event.status == 200 else None
        if reply is None:
            return self._fall_back(f"prefill_{event.status}" if event.status != 200 else "prefill_bad_reply")
        self._move("prefilled")
        assert self.decode is not None
        body = decode_body(self._request.path, self._request.body, self._handle, reply.prompt_token_ids)
        return [CallDecode(engine=self.decode, body=msgspec.json.encode(body), cached_tokens=reply.cached_tokens)]

    def _fall_back(self, reason: str) -> list[Action]:
        self._move("fall_back")
        assert self.decode is not None
        self.reason = reason
        return [*self._end_handoff(reason), self._call_alone(self.decode)]

    # --- decode -----------------------------------------------------------------------------------------------

    def _on_decode(self, event: DecodeAnswered) -> list[Action]:
        if event.status >= 500:
            return self._retry(f"decode_{event.status}")
        if event.status >= 400:
            self._move("answer")
            return [*self._end_handoff("client_error"), Answer(status=event.status, body=event.body)]
        if event.streaming:
            self._move("first_byte")
            return [PassOn(event.body)]
        self._move("answer")
        self._settle("ok")
        return [Answer(status=event.status, body=event.body)]

    def _on_failure(self, reason: str) -> list[Action]:
        if self.state == "prefilling":
            return self._fall_back(f"prefill_{reason}")
        if self.state == "streaming":
            self._move("break")
            message = f"the engine broke off: {reason}"
            return [*self._end_handoff(f"decode_{reason}"), CloseStream(error_event(502, message))]
        return self._retry(f"decode_{reason}")

    def _retry(self, reason: str) -> list[Action]:
        begin, tried = self._begin, self.decode
        other = None
        if self.state != "retrying" and begin is not None and tried is not None:
            other = choose_alone(
                begin.snapshot,
                self._request.model,
                policy=self._settings.policy,
                turn=begin.turn,
                exclude=frozenset({tried.engine_id}),
            )
        if other is None:
            self._move("reject")
            message = f"no engine could answer: {reason}"
            return [*self._end_handoff(reason), Answer(status=502, body=error_body(502, message))]
        self._move("retry")
        self.reason = reason
        return [*self._end_handoff(reason), self._call_alone(other)]

    # --- endings ----------------------------------------------------------------------------------------------

    def _on_deadline(self) -> list[Action]:
        message = "the request took longer than this router allows"
        if self.state == "streaming":
            self._move("break")
            return [*self._end_handoff("deadline"), CloseStream(error_event(504, message))]
        self._move("reject")
        return [*self._end_handoff("deadline"), Answer(status=504, body=error_body(504, message))]

    def _end_handoff(self, reason: str) -> list[Action]:
        pair = self._pair
        self._settle(reason)
        return [] if pair is None else [EndHandoff(pair=pair, handoff_id=self.handoff_id, reason=reason)]

    def _settle(self, outcome: str) -> None:
        if self._pair is not None:
            self.outcome = outcome
            self._pair = None

    def _move(self, move: str) -> None:
        try:
            self.state = MOVES[self.state, move]
        except KeyError:
            raise IllegalTransition(f"journey: {move} in state {self.state}") from None
