"""The connector's half in vLLM's scheduler process: talks to the daemon about requests, plans each step for the worker.

Only dispatches between vLLM's hooks, the daemon's messages, and the two tables of requests (`sends`, `loads`).

When the weights change, and at a reset, all that is under way ends: it belongs to the weights of before. The daemon is
told the new epoch ahead of whatever is asked of it next. While the epoch is not known, requests that come wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from pdx.config import LOOKUP_S, Offload
from pdx.engine.link import Link
from pdx.engine.vllm import prompts
from pdx.engine.vllm.adapters import Adapters
from pdx.engine.vllm.epoch import Epoch
from pdx.engine.vllm.loads import Loads, log
from pdx.engine.vllm.names import Names
from pdx.engine.vllm.pace import Pace
from pdx.engine.vllm.prompts import Prompt
from pdx.engine.vllm.sends import Sends
from pdx.engine.vllm.steps import Report, Step
from pdx.engine.vllm.tainted import OwnCache, Tainted
from pdx.engine.vllm.unread import Unread
from pdx.errors import HandleError, Refused
from pdx.layout import PageLayout
from pdx.wire import (
    BLOCKS_MAX,
    LoadEnded,
    LoadOpened,
    Message,
    Renew,
    Reset,
    Role,
    SendEnded,
    SendOpened,
    WeightEpoch,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

# pdxd answers in some 0.2 ms. Waiting so long saves an idle engine one turn (1.5 ms), a busy one a decode step (40 ms).
WAIT_A_STEP_S = 0.002
RENEW_S = 1.0  # against leases of 30 s
# Workers look in their next step, for as long as they read their weights: some 50 ms a GB on a CPU, 1 ms on a device.
EPOCH_WAIT_S = 30.0


class SchedulerSide:
    """Owned by the scheduler's thread. No method blocks for longer than WAIT_A_STEP_S per step in all."""

    def __init__(
        self,
        link: Link,
        *,
        role: Role,
        layout: PageLayout,
        block_tokens: int,
        ranks: int = 1,
        hybrid: bool = False,
        adapters: Adapters | None = None,
        offload: Offload = "off",
        shares: bool = True,
        lookup_s: float = LOOKUP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ranks`: workers of this engine, each of which reports every load. `hybrid`: see `caches.Description`.

        `offload`: which blocks of requests outside handoffs are kept, and looked up: none, prompts', or all.
        `shares`: what one handoff brings may serve other requests.
        `lookup_s`: a look-up that is answered later is a miss.
        """
        self._link = link
        self._role = role
        self._offload = offload
        self._shares = shares
        self._block_tokens = block_tokens
        self._hybrid = hybrid
        self._adapters = adapters or Adapters({})
        self._clock = clock
        self._line = link.line
        self._lines_left = 0, 0  # see `Step`
        self._names = Names()
        unread = Unread()
        self._sends = Sends(link, layout=layout, block_tokens=block_tokens, names=self._names, unread=unread)
        self._pace = Pace(block_tokens=block_tokens)
        self._loads = Loads(
            link, layout=layout, block_tokens=block_tokens, lookup_s=lookup_s, pace=self._pace, names=self._names,
            unread=unread, ranks=ranks, hybrid=hybrid,
        )  # fmt: skip
        self._step = 0
        self._wait_left_s = WAIT_A_STEP_S
        self._heard_this_turn = False
        self._renew_at = 0.0
        self._waiting: set[str] = set()  # requests that have not been scheduled yet, for the router
        self._unasked: set[str] = set()  # requests whose first answer is still worth a wait
        self._running_told = 0
        self._epoch = Epoch(ranks)
        # The epoch as this incarnation of the daemon knows it. None: what it was told when we attached, which may have
        # been true then.
        self._told: str | None = ""
        self._resets: dict[str, None] = {}  # epochs whose blocks it has yet to clear
        self._unread_resets: dict[str, None] = {}  # those that it may not have read so far
        self._asked_since: set[str] = set()  # requests whose first answer says that it has
        # Requests that wait for the epoch, and until when, once their turn has come: a pause may last for minutes.
        self._held: dict[str, tuple[Request, float | None]] = {}
        self._unfinished: dict[str, Request] = {}
        self._queued: dict[str, bool] = {}  # those that never had blocks: have they used their handle, good for once?
        self._tainted = Tainted()

    def bind(self, own: OwnCache) -> None:
        """The engine's own cache, which vLLM makes after its connector."""
        self._tainted.bind(own)

    # --- requests come and go ---------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Asks the daemon at once, so that its answer is there when the scheduler first looks at the request."""
        self._hear()
        self._waiting.add(request.request_id)
        self._unfinished[request.request_id] = request
        self._queued[request.request_id] = False
        if self._epoch.name is None:
            self._held[request.request_id] = request, None
        elif self._epoch.name == self._told:
            self._open(request)

    def matched_tokens(self, request_id: str, local_tokens: int) -> tuple[int | None, bool]:
        """vLLM's question before each admission: (None, False) ask again, (0, False) compute, (n, True) load n."""
        if not self._heard_this_turn:  # of all that wait, one listens: it costs some 7 us
            self._heard_this_turn = True
            self._hear()
        if request_id in self._held:
            request, until = self._held[request_id]
            until = until or self._clock() + EPOCH_WAIT_S
            if self._clock() < until:
                self._held[request_id] = request, until
                return None, False
            del self._held[request_id]
        if self._undecided(request_id):
            if self._loads.lapsed(request_id) and self._loads.ask_anew(request_id, self._clock()):
                self._unasked.add(request_id)
            if request_id in self._unasked and not self._loads.lapsed(request_id):
                self._wait_for_answer(request_id)
            if self._undecided(request_id):
                return None, False
        tokens = self._loads.promised(request_id, local_tokens)
        return tokens, tokens > 0

    def allocated(self, request_id: str, tables: Sequence[list[int]], external_tokens: int) -> None:
        """`tables`: the request's block ids, by KV group."""
        self._queued.pop(request_id, None)
        if self._tainted.admitted(request_id):
            self._sends.drop(request_id, "it shares blocks that were computed with other weights")
        self._loads.allocated(request_id, tables, external_tokens, incarnation=self._line[0])

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """The request ended in any way. Returns what its reply's kv_transfer_params may say."""
        self._hear()
        self._waiting.discard(request_id)
        self._unasked.discard(request_id)
        self._asked_since.discard(request_id)
        self._unfinished.pop(request_id, None)
        self._held.pop(request_id, None)
        self._queued.pop(request_id, None)
        self._tainted.finished(request_id)
        self._loads.finished(request_id)
        result = self._sends.finished(request_id)
        self._names.forget(request_id)
        return result

    # --- steps ------------------------------------------------------------------------------------------------

    def step(self, scheduled: SchedulerOutput) -> Step:
        """What the worker does in the step that vLLM has just scheduled."""
        self._hear()
        self._heard_this_turn = False
        self._step += 1
        self._wait_left_s = WAIT_A_STEP_S
        self._waiting.difference_update(scheduled.num_scheduled_tokens)
        self._tainted.stepped(scheduled.preempted_req_ids or ())
        if self._adapters.digests:
            self._look_at_adapters(scheduled.num_scheduled_tokens)
        if self._hybrid:
            self._offer_now(scheduled)
        saves = self._sends.saves(self._step, scheduled)
        if not self._hybrid:
            self._sends.offer(scheduled)
        work = self._loads.take_work()
        self._renew(running=len(scheduled.num_scheduled_tokens))
        timed = scheduled.total_num_scheduled_tokens > 0
        if timed:
            self._pace.planned(self._step, prompt_tokens=self._prompt_tokens(scheduled), now=self._clock())
        return Step(
            number=self._step,
            incarnation=self._line[0],
            tokens=scheduled.total_num_scheduled_tokens,
            saves=saves,
            loads=work.starting,
            finishing=work.finishing,
            dropping=work.dropping,
            epoch=self._epoch.states,
            asked=self._epoch.asked,
            left=self._lines_left,
            timed=timed,
        )

    def reported(self, report: Report) -> None:
        self._pace.over(report.step, now=self._clock())
        self._loads.reported(report)
        if not report.seen:
            return
        before = self._epoch.name
        self._epoch.reported(report.seen)
        now = self._epoch.name
        if now is None:
            return
        self._link.at(now)
        if before is not None and now != before:
            self._part("the weights have changed")
        self._tell()
        if now == self._told:
            for request, _ in self._held.values():
                self._open(request)
        self._held.clear()

    def reset(self) -> bool:
        """Nothing that was computed before is loaded or found again, here or in the daemon: it clears all blocks of
        this engine's kind. Always possible: a daemon that is away clears them when it comes back, before all else."""
        self._hear()
        if self._epoch.name is not None:
            self._resets[self._epoch.name] = None
        self._epoch.ask()
        self._part("the cache was reset")
        self._tell()
        return True

    def take_counts(self) -> dict[str, int]:
        counts = {"blocks_forgotten": self._sends.blocks_forgotten, "too_large": self._link.too_large}
        self._sends.blocks_forgotten = self._link.too_large = 0
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        self._link.close()

    # --- the epoch --------------------------------------------------------------------------------------------

    def _part(self, reason: str) -> None:
        """From all that is under way, and from what requests that are here have computed. Open `_held` afterwards."""
        log.warning("%s: KV of before is neither loaded nor kept any more", reason)
        self._sends.end_all(reason)
        self._loads.end_all(reason)
        self._tainted.begin([request_id for request_id in self._unfinished if request_id not in self._queued])
        for request_id, request in self._unfinished.items():  # these have computed nothing yet, and ask anew
            if request_id in self._queued:
                self._held.setdefault(request_id, (request, None))

    def _tell(self) -> None:
        """Before any other message: what the daemon is asked for is of the epoch that it knows."""
        while self._resets and self._link.send(Reset(epoch=(epoch := next(iter(self._resets))))):
            del self._resets[epoch]
            self._unread_resets[epoch] = None
            self._asked_since.clear()
        name = self._epoch.name
        if name is not None and name != self._told and not self._resets and self._link.send(WeightEpoch(epoch=name)):
            self._told = name

    # --- the daemon -------------------------------------------------------------------------------------------

    def _open(self, request: Request) -> None:
        """Asks for all that this request may send, load or keep."""
        sends = self._role != "decode" and prompts.asks_for(request, prompts.SEND_FLAG)
        loads = self._role != "prefill" and prompts.asks_for(request, prompts.LOAD_FLAG)
        if self._is_too_large(request):
            return
        salt = self._salt(request)
        if salt is None:
            return
        unused = (sends or loads) and not self._queued.get(request.request_id)
        handed = self._read(request, salt) if unused else None
        if handed and request.request_id in self._queued:
            self._queued[request.request_id] = True
        keeps = self._offload != "off"
        own = prompts.blocks_of(request, salt=salt, block_tokens=self._block_tokens) if keeps else None
        now = self._clock()
        found = handed if loads and handed else own
        if found and not request.skip_reading_prefix_cache:
            self._loads.open(request, found, now)
        if handed and sends:
            self._sends.open(request, handed, now)
        elif keeps:
            first, origin = (len(handed.block_hashes), handed.handoff_id) if handed else (0, b"")
            self._sends.follow(request, salt=salt, first=first, answer=self._offload == "all", origin=origin)
        if handed or own:
            self._unasked.add(request.request_id)
            if self._unread_resets:
                self._asked_since.add(request.request_id)

    def _is_too_large(self, request: Request) -> bool:
        if request.num_prompt_tokens <= BLOCKS_MAX * self._block_tokens:
            return False
        self._link.refuse(f"a request of {request.num_prompt_tokens} tokens has too many blocks")
        return True

    def _look_at_adapters(self, request_ids: Iterable[str]) -> None:
        """Whether their files are those of the start: once a step for each that computes in it, of which vLLM allows a
        few, however many requests use it."""
        adapted = {
            request.request_id: request.lora_request.lora_name
            for request in self._sends.adapted(request_ids)
            if request.lora_request is not None
        }
        changed = self._adapters.changed(set(adapted.values())) if adapted else ()
        for request_id, name in adapted.items():
            if name in changed:
                self._sends.drop(request_id, "its adapter's files have changed")

    def _salt(self, request: Request) -> bytes | None:
        """Of its adapter. None: what the request computes has no name, and it is served as if there were no pdxd."""
        try:
            return self._adapters.salt(request.lora_request)
        except Refused as error:
            # As text: a log's handler may keep the record, and an error knows all that was on the stack.
            log.warning("request %s is served without pdx: %s", request.request_id, str(error))
            return None

    def _read(self, request: Request, salt: bytes) -> Prompt | None:
        """What its handle covers; None if that is no good, and the request is served as if it had none."""
        try:
            return prompts.read(request, salt=salt, block_tokens=self._block_tokens, shared=self._shares)
        except (HandleError, Refused) as error:
            log.warning("request %s is served without handoff: %s", request.request_id, error)
            return None

    def _wait_for_answer(self, request_id: str) -> None:
        """Only once for each request, and only for the first answer: a "wait" may last for seconds."""
        self._unasked.discard(request_id)
        until = time.monotonic() + self._wait_left_s
        while self._undecided(request_id) and not self._loads.told_to_wait(request_id) and self._wait_left_s > 0:
            self._hear(self._wait_left_s)
            self._wait_left_s = until - time.monotonic()

    def _offer_now(self, scheduled: SchedulerOutput) -> None:
        """Before this step's saves: in the next step, some of its blocks may lie behind a window."""
        offered = self._sends.offer(scheduled)
        until = time.monotonic() + self._wait_left_s
        while self._sends.unanswered(offered) and self._wait_left_s > 0:
            self._hear(self._wait_left_s)
            self._wait_left_s = until - time.monotonic()

    def _hear(self, timeout_s: float = 0.0) -> None:
        line = self._link.line
        if line != self._line:
            if self._line[0]:
                self._lines_left = self._lines_left[0] + 1, self._line[0]
            self._line, self._told = line, None
            self._resets = self._unread_resets | self._resets
            self._unread_resets = {}
            self._sends.lost()
            self._loads.lost()
        self._tell()
        for message in self._link.take(timeout_s):
            self._heard(message)

    def _heard(self, message: Message) -> None:
        if isinstance(message, SendOpened | SendEnded | LoadOpened):
            request_id = self._names.back(message.request_id)
            if request_id != message.request_id:
                message = msgspec.structs.replace(message, request_id=request_id)
            if request_id in self._asked_since:
                self._unread_resets.clear()
                self._asked_since.clear()
        match message:
            case SendOpened():
                self._sends.opened(message)
            case SendEnded():
                self._sends.ended(message)
            case LoadOpened():
                self._loads.opened(message, self._clock())
            case LoadEnded():
                self._loads.ended(message)

    def _prompt_tokens(self, scheduled: SchedulerOutput) -> int:
        """Of the tokens of this step, those that are prompts'."""
        tokens = 0
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self._unfinished.get(request_id)
            if request is not None:
                tokens += max(0, min(count, request.num_prompt_tokens - request.num_computed_tokens))
        return tokens

    def _undecided(self, request_id: str) -> bool:
        now = self._clock()
        return self._loads.undecided(request_id, now) or self._sends.undecided(request_id, now)

    def _renew(self, *, running: int) -> None:
        now = self._clock()
        went_idle = running == 0 and self._running_told > 0  # the last chance to say so: idle engines take no steps
        if now < self._renew_at and not went_idle:
            return
        self._renew_at = now + RENEW_S
        self._running_told = running
        live = [*self._sends.live, *self._loads.live]
        rate = self._pace.tokens_per_s
        self._link.send(Renew(handoff_ids=live, running=running, waiting=len(self._waiting), tokens_per_s=rate))
