"""One request's way through the engines, as a pure machine: events in, actions out, time and randomness passed in.

    choosing ── pair ──► prefilling ── seed ──► seeding ─────── first_byte ──► streaming ── finish ──► ended
        │                    │  │                  └─ retry ─► reseeding ─┘
        │                    │  └── prefilled ──► decoding ──── first_byte ──┘   (also: answer, reject, break,
        │                    └───── fall_back ──► alone ─────── first_byte ──┘    leave, each to ended)
        ├── both ──► both ── prefilled ► decoding, fall_back ► alone, first_byte ► overtaking ► streaming
        ├── alone ──────────────────────────────► alone ─ retry ─► retrying (alone, another engine, and another …)
        └── line_up ─► queued, from where it goes on as from choosing

Three ways through a pair. *Seeded*: prefill's first token is streamed at once, decode continues from it. *Paired*: both
engines are asked at once, the answer is decode's. *After*: decode is asked when prefill has answered, and makes every
token itself; what was to be seeded ends here if the token's text can't be shown by itself,
or if decode will refuse the rest.

Its rules: an error that the client caused (4xx) reaches the client as the engine put it; where it may be the engine's
own, others are asked first. An error of prefill costs the handoff, never the request: the chosen decode engine computes
the prompt itself. An error of decode before its first byte, a redirect among them, is repeated on other engines,
`retries` times and as long as the router's budget lasts, after a seed with prompt and seed. Once the client has bytes
that nobody can continue, the stream ends with an error event. Whoever leaves early cancels the handoff at both daemons.
Who finds every fitting engine full lines up (`admission`).

A journey belongs to the task that serves its client's connection.
"""

from __future__ import annotations

from typing import Any, Literal, assert_never

import msgspec

from pdx.errors import IllegalTransition
from pdx.handoff.handle import TransferHandle, mint
from pdx.router.choice import policy
from pdx.router.choice.policy import Candidate, Pair, Snapshot
from pdx.router.front.replies import REFUSALS, as_event, error_body
from pdx.router.line.retries import RetryBudget
from pdx.router.request.actions import (
    DOUBTFUL_STATUSES,
    Action,
    Answer,
    Begin,
    CallDecode,
    CallPrefill,
    ClientGone,
    CloseStream,
    DeadlinePassed,
    DecodeAnswered,
    DecodeFailed,
    DropPrefill,
    EndHandoff,
    Event,
    HandoffBroke,
    LineUp,
    PassOn,
    PrefillAnswered,
    PrefillFailed,
    ShowCached,
    StreamFinished,
    TurnedAway,
    Write,
)
from pdx.router.request.prefill_reply import PrefillReply
from pdx.router.request.refusals import last_word, may_be_engines, no_answer
from pdx.router.request.request import Request
from pdx.router.request.room import roomy, soon, soon_in_s
from pdx.router.request.seed import Seed, own_answer
from pdx.router.request.seedable import unseedable_reason
from pdx.router.request.servable import (
    WITH_IDS,
    alone_reason,
    decode_body,
    early_body,
    output_limit,
    prefill_body,
    seeded_body,
)
from pdx.router.request.settings import Settings
from pdx.router.request.states import HEARD, MOVES, State
from pdx.router.request.usage import with_cached

Way = Literal["seeded", "paired", "after", "alone"]


class Journey:
    """One request. `on(event)` returns what to do next, in order; an event the table forbids changes nothing.

    `way`, `outcome`, `reason` and `unseeded` are for headers and metrics: how the answer is made, what became of the
    handoff, why an engine answers alone, and why decode makes the first token; `repeats` and `held_back`: how often it
    was repeated, and whether the router's budget has kept it from being so. Without `budget` a journey has its own.
    """

    def __init__(self, request: Request, settings: Settings, budget: RetryBudget | None = None) -> None:
        self.state: State = "choosing"
        self.way: Way = "alone"
        self.reason = ""
        self.unseeded = ""
        self.outcome = "none"  # "none", "ok", "client_error", "not_needed", or why it failed
        self.prefill: Candidate | None = None
        self.decode: Candidate | None = None
        self.handoff_id = b""
        self.repeats = 0
        self.held_back = False
        self._request = request
        self.streams = bool(request.body.get("stream"))
        self._settings = settings
        self._budget = budget or RetryBudget()
        self._tried: list[Candidate] = []  # decode engines that have failed
        self._begin: Begin | None = None
        self._pair: Pair | None = None  # while its handoff may still be under way
        self._handle = ""
        self._beside = False  # prefill is under way beside decode
        self.reply: PrefillReply | None = None  # prefill's, if decode goes by it
        self._seed: Seed | None = None  # given out, or held for a whole answer

    @property
    def by_pair(self) -> bool:
        """Whether the answer comes, or would have come, from a pair."""
        return bool(self.handoff_id) and not self.reason

    @property
    def handed_over(self) -> bool:
        """Whether decode goes on from what prefill, whose reply is there, has handed over."""
        reply = self.reply
        return self.by_pair and self.outcome == "none" and not self._beside and bool(reply and reply.handed_over)

    @property
    def _opened(self) -> bool:
        """Whether the client has bytes."""
        return self.state in ("streaming", "overtaking") or (self._seed is not None and self.streams)

    def __repr__(self) -> str:
        engines = [candidate.engine_id for candidate in (self.prefill, self.decode) if candidate]
        return f"<Journey {self.state} {'→'.join(engines) or '-'} {self.reason or self.outcome}>"

    def on(self, event: Event) -> list[Action]:
        if self.state not in HEARD.get(type(event), (self.state,)):
            raise IllegalTransition(f"journey: {type(event).__name__} in state {self.state}")
        match event:
            case Begin():
                return self._choose(event)
            case TurnedAway():
                return self._turned_away(event)
            case PrefillAnswered():
                return self._on_prefill(event)
            case PrefillFailed():
                return self._fall_back(f"prefill_{event.reason}")
            case HandoffBroke():
                return self._fall_back("handoff_failed")
            case DecodeAnswered():
                return self._on_decode(event)
            case DecodeFailed():
                return self._on_decode_failure(event)
            case StreamFinished():
                self._move("finish")
                return [*self._finished(), CloseStream()]
            case DeadlinePassed():
                message = "the request took longer than this router allows"
                return self._give_up("deadline", Answer(status=504, body=error_body(504, message)))
            case ClientGone():
                self._move("leave")
                return self._end_handoff("client_gone")
            case _:
                assert_never(event)

    # --- choosing ---------------------------------------------------------------------------------------------

    def _choose(self, begin: Begin) -> list[Action]:
        reason = alone_reason(self._request.path, self._request.body)
        need = f"{'alone' if reason else 'pair'} {self._request.model}"
        if need in begin.behind:
            return self._line_up(need)
        in_time = msgspec.structs.replace(begin, snapshot=soon(begin.snapshot, self._settings))
        with_room = msgspec.structs.replace(begin, snapshot=roomy(in_time.snapshot, self._settings))
        line_max = self._settings.max_waiting or policy.NO_LIMIT
        pair = None if reason else self._choose_pair(with_room, line_max)
        instead = self._choose_instead(pair, with_room, line_max) if pair is not None else None
        if instead is not None:
            return self._go_alone(*instead, begin)
        if pair is not None:
            return self._set_out(pair, begin)
        alone = bool(reason) or self._choose_pair(begin, policy.NO_LIMIT) is None
        decode = self._choose_alone(with_room, line_max) if alone else None
        if decode is not None:
            return self._go_alone(decode, reason or "no_pair", begin)
        choose = self._choose_alone if alone else self._choose_pair
        if choose(in_time, policy.NO_LIMIT) is not None:
            return self._line_up(need)
        late = choose(begin, policy.NO_LIMIT)
        instead = self._choose_instead(late, with_room, line_max) if isinstance(late, Pair) else None
        if instead is not None:  # prefill alone has too much to do
            return self._go_alone(*instead, begin)
        if late is not None:
            in_s = soon_in_s(begin.snapshot, self._request.model, self._settings, alone=alone)
            return self._turned_away(TurnedAway(why="long_wait", retry_after_s=in_s))
        self.reason = "no_decode"
        message = f"no decode engine is ready for model {self._request.model!r}"
        return self._turn_away(503, message, begin.retry_after_s)

    def _go_alone(self, engine: Candidate, reason: str, begin: Begin) -> list[Action]:
        self._move("alone")
        self._begin, self.reason = begin, reason
        return [self._call_alone(engine)]

    def _choose_pair(self, begin: Begin, line_max: int) -> Pair | None:
        name, model = self._settings.policy, self._request.model
        return policy.choose_pair(
            begin.snapshot, model, policy=name, turn=begin.turn, line_max=line_max, asked=begin.asked
        )

    def _choose_instead(self, pair: Pair, begin: Begin, line_max: int) -> tuple[Candidate, str] | None:
        name, model = self._settings.policy, self._request.model
        return policy.choose_instead(pair, begin.snapshot, model, policy=name, line_max=line_max, asked=begin.asked)

    def _choose_alone(self, begin: Begin, line_max: int, exclude: frozenset[str] = frozenset()) -> Candidate | None:
        return policy.choose_alone(
            begin.snapshot,
            self._request.model,
            policy=self._settings.policy,
            turn=begin.turn,
            line_max=line_max,
            exclude=exclude,
            asked=begin.asked,
        )

    def _line_up(self, need: str) -> list[Action]:
        self._move("line_up")
        return [LineUp(need)]

    def _turned_away(self, event: TurnedAway) -> list[Action]:
        self.reason = event.why
        return self._turn_away(*REFUSALS[event.why], event.retry_after_s)

    def _turn_away(self, status: int, message: str, retry_after_s: int) -> list[Action]:
        self._move("reject")
        return [Answer(status=status, body=error_body(status, message), retry_after_s=retry_after_s)]

    def _set_out(self, pair: Pair, begin: Begin) -> list[Action]:
        path, body, wish = self._request.path, self._request.body, self._settings.journey
        match wish:
            case "paired" | "after":
                self.way = wish if path in WITH_IDS else "paired"
            case "auto" | "seeded":
                self.unseeded = unseedable_reason(path, body, pair.prefill.info, pair.decode.info)
                self.way = "paired" if self.unseeded else "seeded"
        self._beside = self.way == "paired"
        self._move("both" if self._beside else "pair")
        self._begin, self._pair, self.prefill, self.decode = begin, pair, pair.prefill, pair.decode
        self.handoff_id = begin.handoff_id
        self._handle = self._mint(pair, begin)
        prompt = begin.asked.prompt
        ids = prompt.ids_at(pair.prefill) if prompt is not None else None
        asked = msgspec.json.encode(prefill_body(path, body, self._handle, ids))
        timeout_s = self._settings.prefill_timeout_s
        call = CallPrefill(engine=pair.prefill, body=asked, timeout_s=timeout_s, prompt=prompt)
        return [call, self._call(early_body(body, self._handle))] if self._beside else [call]

    def _mint(self, pair: Pair, begin: Begin) -> str:
        handle = TransferHandle(
            handoff_id=begin.handoff_id,
            attempt=0,
            prefill_engine=pair.prefill.engine_id,
            decode_engine=pair.decode.engine_id,
            prefill_daemon=pair.prefill.daemon,
            decode_daemon=pair.decode.daemon,
            budgets=self._settings.budgets,
            issued_unix_s=begin.now_unix_s,
            traceparent=self._request.traceparent,
        )
        return mint(handle, self._settings.cluster_key)

    def _call(self, body: dict[str, Any]) -> CallDecode:
        assert self.decode is not None
        cached = self.reply.cached if self.reply else None
        return CallDecode(
            engine=self.decode, body=msgspec.json.encode(body), cached=cached, seed=self._seed,
            waits=self._beside,
        )  # fmt: skip

    def _call_alone(self, engine: Candidate) -> CallDecode:
        self.decode, self.way = engine, "alone"
        self.reply = None  # its numbers of cached tokens are not this engine's
        prompt = self._begin.asked.prompt if self._begin is not None else None
        return CallDecode(engine=engine, body=self._request.raw, prompt=prompt)

    # --- prefill ----------------------------------------------------------------------------------------------

    def _on_prefill(self, event: PrefillAnswered) -> list[Action]:
        if 400 <= event.status < 500 and event.status not in DOUBTFUL_STATUSES and not self._beside:
            self._move("reject")
            return [*self._end_handoff("client_error"), Answer(status=event.status, body=event.body)]
        reply = PrefillReply.read(event.body, with_ids=self._request.path in WITH_IDS) if event.status == 200 else None
        if reply is None:
            return self._fall_back(f"prefill_{event.status}" if event.status != 200 else "prefill_bad_reply")
        beside, self._beside = self._beside, False
        ended = [] if reply.handed_over else self._end_handoff("not_sent")
        if beside:
            self._move("prefilled")
            self.reply = reply
            return ended if reply.cached is None else [*ended, ShowCached(reply.cached)]
        return ended + (self._on_seed(reply, event.body) if self.way == "seeded" else self._decode_after(reply))

    def _on_seed(self, reply: PrefillReply, body: bytes) -> list[Action]:
        assert self.decode is not None
        seed, wanted = reply.seed, self._request.body
        room = (self.decode.info.context_tokens or policy.NO_LIMIT) - len(reply.prompt_token_ids)
        overfull = (wanted.get("min_tokens") or 0) > room  # which decode refuses, before any token
        if seed is not None and not overfull and seed.is_all(output_limit(self._request.path, wanted), room):
            self._move("answer")
            ended = self._end_handoff("not_needed")
            if not self.streams:
                return [*ended, Answer(status=200, body=own_answer(body))]
            usage = bool((wanted.get("stream_options") or {}).get("include_usage"))
            return [*ended, Write(seed.stream(usage=usage)), CloseStream()]
        self.unseeded = seed.unusable(wanted.get("stop")) if seed is not None else "no_seed"
        self.unseeded = "min_tokens" if overfull else self.unseeded
        if seed is None or self.unseeded:
            self.way = "after"
            return self._decode_after(reply)
        self._move("seed")
        self.reply, self._seed = reply, seed
        call = self._call(self._seeded_body(self._handle))
        return [Write(seed.opening()), call] if self.streams else [call]

    def _decode_after(self, reply: PrefillReply) -> list[Action]:
        self._move("prefilled")
        self.reply = reply
        return [self._call(decode_body(self._request.path, self._request.body, self._handle, reply.prompt_token_ids))]

    def _seeded_body(self, handle: str) -> dict[str, Any]:
        assert self._seed is not None
        assert self.reply is not None
        ids = self.reply.prompt_token_ids
        return seeded_body(self._request.path, self._request.body, handle, ids, self._seed.token_id)

    def _fall_back(self, reason: str) -> list[Action]:
        """Goes on without prefill. A decode engine that is at work already computes what it lacks."""
        self._move("fall_back")
        if self._beside:
            self._beside = False
            if self.state == "alone":
                self.reason, self.way = reason, "alone"
            return self._end_handoff(reason)
        assert self.decode is not None
        self.reason = reason
        return [*self._end_handoff(reason), self._call_alone(self.decode)]

    # --- decode -----------------------------------------------------------------------------------------------

    def _on_decode(self, event: DecodeAnswered) -> list[Action]:
        if may_be_engines(event.status):
            return self._retry(f"decode_{event.status}", event.snapshot, last_word(event, opened=self._opened))
        if event.status >= 400:
            return self._give_up("client_error", last_word(event, opened=self._opened))
        if self._seed is not None and event.streaming != self.streams:
            return self._retry("decode_bad_reply", event.snapshot)
        if event.streaming:
            self._move("first_byte")
            return [PassOn(event.body)]
        body = self._shown(event.body) if event.status == 200 else event.body
        if body is None:
            return self._retry("decode_bad_reply", event.snapshot)
        self._move("answer")
        return [*self._finished(), Answer(status=event.status, body=body)]

    def _shown(self, body: bytes) -> bytes | None:
        """Decode's whole answer as the client gets it."""
        if self._seed is not None:
            return self._seed.merged(body)
        cached = self.reply.cached if self.reply else None
        return body if cached is None else with_cached(body, cached)

    def _on_decode_failure(self, event: DecodeFailed) -> list[Action]:
        if self.state in ("streaming", "overtaking"):
            told = event.words or event.reason
            return self._give_up(f"decode_{event.reason}", no_answer(f"the engine broke off: {told}"))
        return self._retry(f"decode_{event.reason}", event.snapshot)

    def _retry(self, reason: str, snapshot: Snapshot | None, last: Answer | None = None) -> list[Action]:
        """`last`: what the client gets if there is nobody else."""
        other = self._another(snapshot)
        if other is None:
            return self._give_up(reason, last or no_answer(f"no engine could answer: {reason}"))
        self._move("retry")
        self.repeats += 1
        self.reason = reason
        ended = self._end_handoff(reason)
        if self._seed is None:
            return [*ended, self._call_alone(other)]
        self.decode = other
        return [*ended, self._call(self._seeded_body(handle=""))]

    def _another(self, snapshot: Snapshot | None) -> Candidate | None:
        """An engine that has not failed this request yet, if it may be repeated once more."""
        begin, failed = self._begin, self.decode
        if begin is None or failed is None or self.repeats >= self._settings.retries:
            return None
        self._tried.append(failed)
        if snapshot is not None:
            begin = msgspec.structs.replace(begin, snapshot=snapshot)
        like = failed if self._seed else None  # token ids go on only with an engine that reads them alike
        excluded = policy.unfit(begin.snapshot, self._tried, self._request.model, like=like)
        other = self._choose_alone(begin, policy.NO_LIMIT, excluded)
        if other is not None and not self._budget.take():
            self.held_back = True
            return None
        return other

    # --- endings ----------------------------------------------------------------------------------------------

    def _finished(self) -> list[Action]:
        """The answer is whole."""
        if self._beside:  # decode has computed the prompt itself
            return self._end_handoff("not_needed")
        self._settle("ok")
        return []

    def _give_up(self, reason: str, answer: Answer) -> list[Action]:
        """Ends with this answer, or with the error event that it becomes for a client which has bytes already."""
        if not self._opened:
            self._move("reject")
            return [*self._end_handoff(reason), answer]
        self._move("break")
        return [*self._end_handoff(reason), CloseStream(as_event(answer.body))]

    def _end_handoff(self, reason: str) -> list[Action]:
        drops: list[Action] = [DropPrefill()] if self._beside else []
        pair, self._beside = self._pair, False
        self._settle(reason)
        return drops if pair is None else [*drops, EndHandoff(pair=pair, handoff_id=self.handoff_id, reason=reason)]

    def _settle(self, outcome: str) -> None:
        if self._pair is not None:
            self.outcome = outcome
            self._pair = None

    def _move(self, move: str) -> None:
        try:
            self.state = MOVES[self.state, move]
        except KeyError:
            raise IllegalTransition(f"journey: {move} in state {self.state}") from None
