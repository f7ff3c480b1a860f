"""A simulated engine: serves requests as vLLM with our connector does, one small step at a time.

It keeps the connector's promises to the daemon (pdx.engine.vllm.sends and .loads): every SEND_ENDED and LOAD_ENDED is
answered, LET_GO names a fence, a load that is under way ends only by the worker's report. It lives on without a
daemon, and attaches again. What it computes itself is right by definition; what it loads is compared with the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.simulate.host import Host
from benchmarks.simulate.lives import Engine
from benchmarks.simulate.prompts import PAGES, answer_of, body_of, chunk_of, prompt_of
from benchmarks.simulate.work import Call, Work, lot_of
from benchmarks.simulate.worker import Load, Save, SimulatedWorker, Step
from benchmarks.simulate.world import World
from pdx.handoff.handle import peek
from pdx.layout import Place
from pdx.wire import (
    EngineInfo,
    Finished,
    Keep,
    LetGo,
    LoadEnded,
    LoadOpened,
    Message,
    OpenLoad,
    OpenSend,
    Renew,
    SendEnded,
    SendOpened,
)

if TYPE_CHECKING:
    from benchmarks.simulate.breaks import Parts

RENEW_S = 0.1  # against leases of at least 0.4 s
ANSWER_MARGIN_S = 2.0
ASK_AGAIN_S, EARLY_ASK_AGAIN_S = 0.02, 1.0
BLOCKS_A_STEP = 4
STEP_REQUESTS_MAX = 8
POLL_FIRST_S, POLL_MAX_S = 0.002, 0.03  # of an engine that only waits: the longer, the rarer
SAYING_STEPS_MAX = 3  # a longer answer takes no longer here
OTHER_TOKENS_CHANCE = 0.03  # that decode's idea of the prompt is another than prefill's


class SimulatedEngine(Engine):
    """One engine over all its lives."""

    def __init__(self, world: World, parts: Parts, host: Host, info: EngineInfo) -> None:
        worker = SimulatedWorker(world, parts, f"{info.engine_id}/worker", self._step_ended)
        super().__init__(world, host, info, worker)
        self.letting_go_s = 0.0  # how slow it is in that
        self._works: dict[str, Work] = {}
        self._step = 0
        self._newest_step = 0  # of those that may touch slots of the present daemon
        self._in_step: list[Work] = []
        self._next_at = float("inf")
        self._poll_s = POLL_FIRST_S
        self._renew_at = 0.0

    # --- lives ------------------------------------------------------------------------------------------------

    def _unmapped(self) -> None:
        for work in [*self._works.values(), *self._in_step]:
            self._untouch(work)

    def _scheduler_died(self) -> None:
        for work in self._works.values():
            work.call.reply("broke", "connection reset")

    def _born_again(self) -> None:
        self._works.clear()
        self._in_step = []
        self._step = self._newest_step = 0
        self._next_at = float("inf")

    def _claims_lost(self) -> None:
        self._newest_step = 0
        for work in self._works.values():
            if work.phase == "asking" or (work.places is not None and work.load is None):
                self._go_on_alone(work)

    # --- requests ---------------------------------------------------------------------------------------------

    def serve(self, call: Call, raw: bytes) -> None:
        """A POST arrives."""
        body = msgspec.json.decode(raw)
        params = body.get("kv_transfer_params") or {}
        tokens = tuple(body["prompt"])
        request_id = f"{self.name}-{call.number}"
        work = Work(request_id, call, tokens, int(body.get("max_tokens", 16)), bool(body.get("stream")))
        self._works[request_id] = work
        if params.get("pdx_handle") and self.tie is not None:
            self._ask_daemon(work, params)
        self._go_on()

    def abort(self, call: Call) -> None:
        """The asker has closed the connection."""
        work = self._works.get(f"{self.name}-{call.number}")
        if work is None:
            return
        work.aborted = True
        if work.load is not None and work.phase == "loading":
            work.load.stopping = True
        else:
            self._drop(work, "aborted")

    def _ask_daemon(self, work: Work, params: dict[str, Any]) -> None:
        handle = peek(params["pdx_handle"])
        sends, tokens = bool(params.get("do_remote_decode")), params.get("pdx_tokens", len(work.tokens))
        if not sends and tokens > 1 and self.world.chance.random() < OTHER_TOKENS_CHANCE:
            tokens -= 1
        work.prompt = prompt = prompt_of(work.tokens[:tokens])
        work.handoff_id = handle.handoff_id
        about: dict[str, Any] = {
            "request_id": work.request_id, "handle": params["pdx_handle"], "block_hashes": prompt.block_hashes,
            "prompt_tokens": len(prompt.tokens), "tail_hash": prompt.tail_hash,
        }  # fmt: skip
        work.early = bool(params.get("pdx_early"))
        work.question = OpenSend(**about) if sends else OpenLoad(**about, early=work.early)
        work.phase = "asking"
        patience_s = handle.budgets.grant_s + (handle.budgets.total_s if work.early else 0.0)
        work.deadline = self.world.now + patience_s + ANSWER_MARGIN_S
        work.load_budget_s = handle.budgets.total_s
        self._say(work.question)

    def _drop(self, work: Work, reason: str) -> None:
        """The request is over here; what it has of the daemon is let go."""
        self._works.pop(work.request_id, None)
        if work.phase == "asking" or work.places is not None:
            self._let_go(work, ok=False, reason=reason)

    def _go_on_alone(self, work: Work) -> None:
        """No daemon, no right, no answer: the engine computes what it does not have."""
        self._untouch_after_step(work)
        work.places = work.unsaved = None
        work.phase = "computing"

    def _let_go(self, work: Work, *, ok: bool, reason: str, spoilt: Sequence[int] = ()) -> None:
        self._untouch_after_step(work)
        work.places = work.unsaved = None
        message = LetGo(
            handoff_id=work.handoff_id,
            side=work.side,
            fence=work.last_step,
            ok=ok,
            reason=reason,
            spoilt=list(spoilt),
        )
        if self.letting_go_s:
            self.later(self.letting_go_s, self._say, message)
        else:
            self._say(message)

    # --- the daemon -------------------------------------------------------------------------------------------

    def _say(self, message: Message) -> None:
        if self.tie is not None:
            self.tie.out.send(message)

    def _hear(self, message: Message) -> None:
        self.world.note(self.name, f"hears {type(message).__name__}")
        match message:
            case SendOpened():
                self._send_opened(message)
            case SendEnded():
                self._send_ended(message)
            case LoadOpened():
                self._load_opened(message)
            case LoadEnded():
                self._load_ended(message)
        self._go_on()

    def _send_opened(self, message: SendOpened) -> None:
        work = self._works.get(message.request_id)
        if work is None or work.phase != "asking" or work.handoff_id != message.handoff_id:
            self._say(LetGo(handoff_id=message.handoff_id, side="send", fence=0, ok=False, reason="request is gone"))
            return
        self._take_places(work, list(message.places))
        work.phase = "computing"
        work.unsaved = [n for n, place in enumerate(message.places) if place is not None]
        if not work.unsaved:  # the store holds the whole prompt
            work.handed_over = work.handoff_id.hex()
            self._let_go(work, ok=True, reason="")

    def _send_ended(self, message: SendEnded) -> None:
        works = self._works.values()
        work = next((w for w in works if w.handoff_id == message.handoff_id and w.side == "send"), None)
        if not message.handoff_id:
            work = self._works.get(message.request_id)
        if work is None or (work.places is None and work.phase != "asking"):
            if message.handoff_id:
                ended = LetGo(
                    handoff_id=message.handoff_id, side="send", fence=self._newest_step, ok=False, reason="ended"
                )
                self._say(ended)
            return
        if message.handoff_id:
            self._let_go(work, ok=False, reason=message.reason)
        work.phase = "computing"

    def _load_opened(self, message: LoadOpened) -> None:
        work = self._works.get(message.request_id)
        if work is None or work.phase != "asking":
            if message.status == "granted" and (work is None or work.load is None):
                reason = "request is gone"
                self._say(LetGo(handoff_id=message.handoff_id, side="load", fence=0, ok=False, reason=reason))
        elif message.status == "wait":
            work.ask_again_at = self.world.now + (EARLY_ASK_AGAIN_S if work.early else ASK_AGAIN_S)
        elif message.status == "absent":
            work.phase = "computing"
        else:
            self._take_places(work, list(message.places))
            self._start_load(work)

    def _start_load(self, work: Work) -> None:
        assert work.prompt is not None
        assert work.arena is not None
        places = [place for place in work.places or () if place is not None]
        names = work.prompt.names[: len(places)]
        deadline = self.world.now + work.load_budget_s
        work.load = Load(work.handoff_id, places, names, deadline, work.incarnation, work.arena)
        work.phase = "starting"

    def _load_ended(self, message: LoadEnded) -> None:
        loads = [work for work in self._works.values() if work.phase == "asking" or work.load is not None]
        work = next((w for w in loads if w.handoff_id == message.handoff_id and isinstance(w.question, OpenLoad)), None)
        if work is None:
            self._say(LetGo(handoff_id=message.handoff_id, side="load", fence=0, ok=False, reason="ended before"))
        elif work.load is not None and work.phase == "loading":
            work.load.stopping = True
        else:
            self._let_go(work, ok=False, reason=message.reason)
            work.load, work.phase = None, "computing"

    def _take_places(self, work: Work, places: list[Place | None]) -> None:
        assert self.tie is not None
        work.places, work.arena, work.incarnation = places, self.tie.arena, self.tie.incarnation
        if self.worker.alive:
            work.touching = True
            work.arena.may_touch(places)

    def _untouch(self, work: Work) -> None:
        if work.touching and work.arena is not None and work.places is not None:
            work.touching = False
            work.arena.touches_no_more(work.places)

    def _untouch_after_step(self, work: Work) -> None:
        """Once its step is over, if the work is in one."""
        if work in self._in_step and work.touching:
            rest = Work("", work.call, (), 0, False, places=work.places, arena=work.arena, touching=True)
            self._in_step[self._in_step.index(work)] = rest
            work.touching = False
        else:
            self._untouch(work)

    # --- steps ------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        self._poll_s = POLL_FIRST_S
        self._next_step_in(0.0)

    def _next_step_in(self, seconds: float) -> None:
        at = self.world.now + seconds
        if not self._in_flight and at < self._next_at:
            self._next_at = at
            self.later(seconds, self._begin_step, at)

    @property
    def _in_flight(self) -> bool:
        return self._next_at == -1.0

    def _begin_step(self, at: float) -> None:
        if at != self._next_at:
            return
        self._next_at = float("inf")
        self._ask_again()
        if not self._works or not self.worker.alive:
            return
        self._renew()
        saves, busy, starting = [], [], []
        for work in list(self._works.values())[:STEP_REQUESTS_MAX]:
            if work.phase == "starting" and work.load is not None:
                work.phase = "loading"
                starting.append(work.load)
                busy.append(work)
            elif work.phase == "loading":
                busy.append(work)
            elif work.phase in ("computing", "saying"):
                busy.append(work)
                save = self._compute(work)
                if save is not None:
                    saves.append(save)
        if not busy:
            asking = [min(work.deadline, work.ask_again_at or work.deadline) for work in self._works.values()]
            self._next_step_in(max(POLL_FIRST_S, min(asking) - self.world.now))
            return
        self._step += 1
        self._newest_step = self._step
        for work in busy:
            work.last_step = self._step
        self._in_step = busy
        incarnation = self.tie.incarnation if self.tie is not None else 0
        self._next_at = -1.0
        self.worker.later(0.0001, self.worker.begin, Step(self._step, saves, starting, incarnation))

    def _poll(self) -> None:
        self._next_step_in(self._poll_s)
        self._poll_s = min(self._poll_s * 1.5, POLL_MAX_S)

    def _ask_again(self) -> None:
        now = self.world.now
        for work in list(self._works.values()):
            if work.phase != "asking":
                continue
            if now >= work.deadline:
                self._let_go(work, ok=False, reason="no answer")
                work.phase = "computing"
            elif work.ask_again_at is not None and now >= work.ask_again_at:
                work.ask_again_at = None
                assert work.question is not None
                self._say(work.question)

    def _renew(self) -> None:
        if self.world.now >= self._renew_at:
            self._renew_at = self.world.now + RENEW_S
            live = [w.handoff_id for w in self._works.values() if w.handoff_id and (w.places is not None)]
            self._say(Renew(handoff_ids=live))

    def _compute(self, work: Work) -> Save | None:
        """The blocks of this step; what they leave behind for a handoff."""
        if isinstance(work.question, Keep):
            return self._save_lot(work, work.question)
        blocks = prompt_of(work.tokens).blocks
        if work.computed >= blocks:
            work.phase = "saying"
            work.said += 1
            return None
        work.computed = min(blocks, work.computed + self.world.chance.randint(1, BLOCKS_A_STEP))
        if work.computed == blocks:
            work.said += 1  # the step that ends the prompt says its first token
        if not work.unsaved or work.places is None or work.prompt is None:
            return None
        due = [block for block in work.unsaved if block < work.computed]
        work.unsaved = work.unsaved[len(due) :]
        places = [place for block in due if (place := work.places[block]) is not None]
        if not due:
            return None
        work.handed_over = "" if work.unsaved else work.handoff_id.hex()
        return Save(work.handoff_id, work.prompt.names, due, places, last=not work.unsaved)

    def _save_lot(self, work: Work, question: Keep) -> Save | None:
        """All of it at once; whether the daemon first hears of that, or that nothing will follow, is chance."""
        due, work.unsaved = work.unsaved, []
        if not due or work.places is None:
            return None
        if self.world.chance.random() < 0.5:
            self._say(Finished(handoff_id=question.origin))
        places = [place for block in due if (place := work.places[block]) is not None]
        return Save(work.handoff_id, question.block_hashes, due, places, last=True)

    def _step_ended(self, step: int, ended: list[Load]) -> None:
        """At the very moment of the fence: what the worker touches no more. The scheduler hears of it later."""
        in_step, self._in_step = self._in_step, []
        for work in in_step:
            all_saved = work.unsaved == [] and work.places is not None
            if self._works.get(work.request_id) is not work or all_saved or work.load in ended:
                self._untouch(work)
            if all_saved:
                work.places = work.unsaved = None  # the worker has let go
        self.later(0.0001, self._reported, step, in_step, ended)

    def _reported(self, step: int, in_step: list[Work], ended: list[Load]) -> None:
        """The step is over."""
        self._next_at = float("inf")
        for load in ended:
            self._load_over(load, step)
        progressed = bool(ended)
        for work in in_step:
            if self._works.get(work.request_id) is not work or work.phase == "loading":
                continue
            progressed = True
            if isinstance(work.question, Keep) and work.places is None:  # saved, or never to be
                del self._works[work.request_id]
                self._say(Finished(handoff_id=work.question.origin))
            if work.said:
                self._say_tokens(work)
        if progressed:
            self._go_on()
        else:
            self._poll()

    def _load_over(self, load: Load, step: int) -> None:
        work = next((work for work in self._works.values() if work.load is load), None)
        if work is None:
            return
        leading = next((n for n, layers in enumerate(load.done) if layers < PAGES.layers), len(load.done))
        work.computed = leading
        self.world.counts["loads whole" if load.complete else "loads cut short"] += 1
        work.last_step = step
        work.load = None
        self._let_go(work, ok=load.complete, reason=load.reason, spoilt=load.spoilt)
        work.phase = "computing"
        if work.aborted:
            del self._works[work.request_id]

    def _keep_answer(self, work: Work, said: Sequence[int]) -> None:
        lot = lot_of(work, said, lot_id=self.world.chance.randbytes(16), deadline=self.world.now + ANSWER_MARGIN_S)
        if lot is None or lot.question is None:
            self._say(Finished(handoff_id=work.handoff_id))
        elif self.tie is not None:
            self._works[lot.request_id] = lot
            self._say(lot.question)
            self._go_on()

    def _say_tokens(self, work: Work) -> None:
        """The first token at once for those who stream; the last ends the request."""
        said = answer_of(work.tokens, work.wanted)
        streaming = work.stream and len(said) > 1
        if streaming and work.said == 1:
            work.call.reply("stream", chunk_of(work.request_id, said[:1]))
        if work.said < min(len(said), SAYING_STEPS_MAX):
            return
        del self._works[work.request_id]
        if work.places is not None:
            self._let_go(work, ok=False, reason="request ended before its KV was saved")
        if isinstance(work.question, OpenLoad):
            self._keep_answer(work, said)
        if streaming:
            work.call.reply("end", chunk_of(work.request_id, said[1:], last=True))
        elif work.stream:
            work.call.reply("stream", chunk_of(work.request_id, said, last=True))
            work.call.reply("end", b"")
        else:
            work.call.reply("answer", body_of(work.request_id, work.tokens, said, handed_over=work.handed_over))
