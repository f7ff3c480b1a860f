"""The scheduler's view of incoming requests: asked for, granted, loading, over.

Theory of operation. A request is in `_loads` from its OPEN_LOAD until it needs nothing more from here. `places` says
that the daemon granted, `loading` that vLLM has allocated blocks and the worker fills them. Once loading, only the
worker's report ends it, because only the worker knows that it touches neither slots nor blocks any more: aborts and
LOAD_ENDED merely ask it to stop. Of several ranks each reports once, perhaps in different steps; the last one ends it.
Whatever fails, vLLM recomputes, and this request never comes back here.

What a look-up has found for a request that waits in the queue may be given up again: it has *lapsed*, and is looked up
anew when its turn has come. So is what could not be asked for at first. While that takes a few turns, vLLM asks for all
others that wait, too; those are told to come again.

An *early* request came beside prefill's, not after its reply. Its answer may take as long as prefill's queue and comes
by itself; until then vLLM has given it no blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from pdx.engine.link import Link
from pdx.engine.plan import fits, promised_tokens
from pdx.engine.vllm.names import Names
from pdx.engine.vllm.pace import Pace
from pdx.engine.vllm.prompts import Prompt, new_id
from pdx.engine.vllm.sends import ANSWER_MARGIN_S, GRANT_S_MAX, HANDLE_IN_USE
from pdx.engine.vllm.steps import Load, LoadResult, Report
from pdx.engine.vllm.unread import Unread
from pdx.layout import PageLayout, Place, blocks_for
from pdx.wire import LetGo, LoadEnded, LoadOpened, LookUp, OpenLoad

if TYPE_CHECKING:
    from vllm.v1.request import Request

log = logging.getLogger("vllm.pdx")

ASK_AGAIN_S = 0.005  # an idle engine asks us every 1.5 ms; the daemon need not hear it each time
EARLY_ASK_AGAIN_S = 1.0  # the answer comes by itself; this is for one that was lost
# Look-ups that are out anew at once: for the request that is admitted next, and one more. What the others of the queue
# would be given before their turn would be taken from them again.
ANEW_MAX = 2
TOTAL_S_MAX = 600.0  # a handle's budget, before anybody verified it, may not exceed this


class Work(NamedTuple):
    """`starting`: loads to begin. `finishing`: nothing more will land, take what has. `dropping`: end at once."""

    starting: list[Load]
    finishing: list[str]
    dropping: list[str]


@dataclass(eq=False)
class _Load:
    request_id: str
    prompt: Prompt
    deadline: float
    tokens: int  # of the request
    ask_again_at: float | None = None  # after a "wait"
    places: list[Place] | None = None
    first: int = 0  # block of the prompt from which on we load; the engine has those before
    loading: bool = False
    covered: bool = False  # by what the engine has itself, when it asked last
    lapsed: bool = False  # what a look-up had found was given up again, or it was not sent: see above
    result: LoadResult | None = None  # of the ranks that have reported
    fence: int = 0  # the last step in which one of them touched our slots

    @property
    def handoff_id(self) -> bytes:
        return self.prompt.handoff_id


class Loads:
    """All incoming requests of one engine. Owned by the scheduler's thread."""

    def __init__(
        self,
        link: Link,
        *,
        layout: PageLayout,
        block_tokens: int,
        lookup_s: float,
        pace: Pace,
        names: Names,
        unread: Unread,
        ranks: int = 1,
        hybrid: bool = False,
    ) -> None:
        self._link = link
        self._names = names
        self._unread = unread
        self._anew: list[_Load] = []  # look-ups sent at their request's turn, of which some are answered
        self._is_silent = False  # a look-up has had no answer in time, and nothing has come since
        self._pace = pace
        self._ranks = ranks
        self._layout = layout
        self._block_tokens = block_tokens
        self._lookup_s = lookup_s
        self._hybrid = hybrid
        self._loads: dict[str, _Load] = {}
        self._asked: dict[bytes, _Load] = {}  # the same, by handoff: thousands of look-ups may end at once
        self._starting: list[Load] = []
        self._finishing: list[str] = []
        self._dropping: list[str] = []

    def open(self, request: Request, prompt: Prompt, now: float) -> None:
        """Asks the daemon. Without one, or where another request that is here has its handle, it is computed."""
        if prompt.handoff_id in self._asked:
            log.warning("request %s is served without handoff: %s", request.request_id, HANDLE_IN_USE)
            return
        load = _Load(request.request_id, prompt, now + self._patience_s(prompt), request.num_tokens)
        load.lapsed = not prompt.handle and self._unread.full
        if load.lapsed or self._ask(load):
            self._loads[load.request_id] = self._asked[load.handoff_id] = load

    def ask_anew(self, request_id: str, now: float) -> bool:
        """vLLM's question for a request whose look-up has lapsed: sends another, if not too many are out, and says so.

        Of a daemon that does not answer nothing is awaited: the request is computed.
        """
        load = self._loads.get(request_id)
        if load is None or not load.lapsed:
            return False
        self._anew = [one for one in self._anew if self._is_out(one, now)]
        if self._is_silent or self._unread.full:
            self._remove(load)
            return False
        if len(self._anew) >= ANEW_MAX:
            return False
        self._remove(load)
        load.lapsed = False
        load.prompt = replace(load.prompt, handoff_id=new_id())
        load.deadline = now + self._patience_s(load.prompt)
        if not self._ask(load):
            return False
        self._loads[request_id] = self._asked[load.handoff_id] = load
        self._anew.append(load)
        return True

    def _is_out(self, load: _Load, now: float) -> bool:
        """A look-up without an answer. If that is late, so would be others'."""
        if load.places is not None or load.lapsed or self._asked.get(load.handoff_id) is not load:
            return False
        self._is_silent = self._is_silent or now >= load.deadline
        return now < load.deadline

    def undecided(self, request_id: str, now: float) -> bool:
        """True while the daemon has not answered for good. Asks again where it said "wait"."""
        load = self._loads.get(request_id)
        if load is None or load.places is not None:
            return False
        if load.lapsed:
            return True
        if now >= load.deadline:
            self._is_silent = self._is_silent or not load.prompt.handle
            self._end(load, ok=False, reason="no answer from pdxd")
            return False
        if load.ask_again_at is not None and now >= load.ask_again_at:
            load.ask_again_at = None
            self._ask(load)
        return True

    def lapsed(self, request_id: str) -> bool:
        """Whether nothing of it is out: see `ask_anew`."""
        load = self._loads.get(request_id)
        return load is not None and load.lapsed

    def told_to_wait(self, request_id: str) -> bool:
        load = self._loads.get(request_id)
        return load is not None and load.ask_again_at is not None

    def promised(self, request_id: str, local_tokens: int) -> int:
        """Tokens that can be loaded beyond the `local_tokens` that the engine has itself. Repeatable: until it has
        blocks for the request, it may lose what it has."""
        load = self._loads.get(request_id)
        if load is None or load.places is None or load.loading:
            return 0
        promised = self._promised(load)
        load.covered = promised <= local_tokens
        return max(0, promised - local_tokens)

    def allocated(
        self, request_id: str, tables: Sequence[list[int]], external_tokens: int, *, incarnation: int
    ) -> None:
        """vLLM has blocks for the request; with external tokens it now waits for our worker to fill the last ones.

        `tables`: the block ids of the whole request, by KV group. `incarnation`: of the daemon that has granted.
        """
        load = self._loads.get(request_id)
        if load is None or load.loading:
            return
        if external_tokens == 0:  # perhaps before the daemon has answered: vLLM does not always wait for that
            self._end(
                load,
                ok=load.covered,
                reason="the engine has it all" if load.covered else "the engine wants no external KV for this request",
            )
            return
        assert load.places is not None
        promised = self._promised(load)
        first, end = (promised - external_tokens) // self._block_tokens, blocks_for(promised, self._block_tokens)
        load.first = first
        places, targets = load.places[first:end], [table[first:end] for table in tables]
        assert places
        assert all(len(target) == len(places) for target in targets)
        self._starting.append(Load(request_id, places, targets, _total_s(load.prompt), incarnation))
        load.loading = True

    def opened(self, message: LoadOpened, now: float) -> None:
        self._is_silent = False
        self._unread.answered(message.request_id)
        load = self._loads.get(message.request_id)
        if load is None or load.places is not None:
            if message.status == "granted" and load is None:
                self._let_go(message.handoff_id, fence=0, ok=False, reason="request is gone")
        elif message.status == "wait":
            load.ask_again_at = now + (EARLY_ASK_AGAIN_S if load.prompt.early else ASK_AGAIN_S)
        elif message.status == "absent":
            if load.prompt.handle:
                log.info("no KV for %s: %s", message.request_id, message.reason)
            self._remove(load)
        elif message.handoff_id != load.handoff_id or not 1 <= len(message.places) <= load.prompt.blocks:
            self._end(load, ok=False, reason="grant does not fit the prompt")
        elif not all(fits(place, self._layout, self._link.arena_bytes) for place in message.places):
            self._end(load, ok=False, reason="pdxd named places outside its arena")
        else:
            load.places = message.places

    def ended(self, message: LoadEnded) -> None:
        """The rest will not come. What has landed may still be taken, in one last pass of the worker.

        Always answered: our last word may be lost. What is not in `_loads` has been reported: its steps are over.
        """
        self._is_silent = False
        load = self._asked.get(message.handoff_id)
        if load is None:
            self._let_go(message.handoff_id, fence=0, ok=False, reason="ended before")
            return
        if not (load.prompt.handle or load.loading):  # it waits for its turn in the queue, and is looked up anew then
            self._let_go(load.handoff_id, fence=0, ok=True, reason="not its turn yet")
            load.places, load.covered, load.lapsed = None, False, True
            return
        log.warning("KV of %s stops coming: %s", load.request_id, message.reason)
        if load.loading:
            self._finishing.append(load.request_id)
        else:
            self._end(load, ok=False, reason=message.reason)

    def finished(self, request_id: str) -> None:
        """The request is over, perhaps while its load is under way."""
        load = self._loads.get(request_id)
        if load is None:
            return
        if load.loading:
            self._dropping.append(request_id)
        else:
            self._end(load, ok=False, reason="request ended")

    def end_all(self, reason: str) -> None:
        """What is not loading yet never will; what is, stops."""
        for load in list(self._loads.values()):
            if load.loading:
                self._dropping.append(load.request_id)
            else:
                self._end(load, ok=False, reason=reason)

    def reported(self, report: Report) -> None:
        """A rank, or several, touch these loads' blocks and slots no more."""
        for request_id, reported in report.loads.items():
            load = self._loads.get(request_id)
            if load is None:
                continue
            result = load.result = reported if load.result is None else load.result.joined(reported)
            load.fence = max(load.fence, report.step)
            if result.ranks < self._ranks:
                if not result.ok:  # nobody needs wait for what is recomputed anyway
                    self._finishing.append(request_id)
                continue
            self._remove(load)
            self._forget_orders(request_id)
            if not result.ok:
                log.warning("KV of %s was not loaded, its prompt is recomputed: %s", request_id, result.reason)
            self._let_go(
                load.handoff_id,
                fence=load.fence,
                ok=result.ok,
                reason=result.reason,
                pages=result.pages,
                done_ns=result.done_ns,
                seconds=result.seconds,
                spoilt=[load.first + position for position in result.spoilt],
            )

    def _forget_orders(self, request_id: str) -> None:
        """Those that its load has no use for any more: a request of the same name may come."""
        for orders in (self._finishing, self._dropping):
            while request_id in orders:
                orders.remove(request_id)

    def take_work(self) -> Work:
        """What the worker's next step is to do about loads."""
        work = Work(self._starting, self._finishing, self._dropping)
        self._starting, self._finishing, self._dropping = [], [], []
        return work

    def lost(self) -> None:
        """The daemon is gone. The worker notices by itself and reports; what it does not have yet ends here."""
        self._loads = {request_id: load for request_id, load in self._loads.items() if load.loading}
        self._asked = {load.handoff_id: load for load in self._loads.values()}
        self._is_silent = False
        self._unread.lost()

    @property
    def live(self) -> Iterable[bytes]:
        """What is to stay here. Not what a look-up has found for a request that waits: it would keep room that others
        need for as long as the queue is."""
        loads = self._loads.values()
        return [load.handoff_id for load in loads if load.places is not None and (load.prompt.handle or load.loading)]

    def _patience_s(self, prompt: Prompt) -> float:
        """The daemon answers by itself within the handle's budgets; this is for one that does not."""
        if not prompt.handle:
            return self._lookup_s  # late is a miss
        grant_s = min(prompt.budgets.grant_s, GRANT_S_MAX)
        return grant_s + (_total_s(prompt) if prompt.early else 0.0) + ANSWER_MARGIN_S

    def _ask(self, load: _Load) -> bool:
        prompt, name = load.prompt, self._names.of(load.request_id)
        if not prompt.handle:
            sent = self._link.send(
                LookUp(
                    request_id=name,
                    handoff_id=prompt.handoff_id,
                    block_hashes=prompt.block_hashes,
                    tenant=prompt.tenant,
                    tokens_per_s=self._pace.tokens_per_s,
                )
            )
            if sent:
                self._unread.sent(load.request_id)
            return sent
        return self._link.send(
            OpenLoad(
                request_id=name,
                handle=prompt.handle,
                block_hashes=prompt.block_hashes,
                prompt_tokens=prompt.tokens,
                tail_hash=prompt.tail_hash,
                early=prompt.early,
                tenant=prompt.tenant,
            )
        )

    def _promised(self, load: _Load) -> int:
        assert load.places is not None
        tokens = promised_tokens(len(load.places), prompt_tokens=load.prompt.tokens, block_tokens=self._block_tokens)
        # vLLM computes a request's last token itself, even if all were loaded; but it gives windows no block that only
        # that token looks at. It would read the null block.
        return min(tokens, load.tokens - 1) if self._hybrid else tokens

    def _remove(self, load: _Load) -> None:
        del self._loads[load.request_id]
        del self._asked[load.handoff_id]

    def _end(self, load: _Load, *, ok: bool, reason: str) -> None:
        self._remove(load)
        if not load.lapsed:
            self._let_go(load.handoff_id, fence=0, ok=ok, reason=reason)

    def _let_go(
        self,
        handoff_id: bytes,
        *,
        fence: int,
        ok: bool,
        reason: str,
        pages: int = 0,
        done_ns: int = 0,
        seconds: float = 0.0,
        spoilt: Sequence[int] = (),
    ) -> None:
        self._link.send(
            LetGo(
                handoff_id=handoff_id,
                side="load",
                fence=fence,
                ok=ok,
                reason=reason,
                pages=pages,
                done_ns=done_ns,
                seconds=seconds,
                spoilt=list(spoilt),
            )
        )


def _total_s(prompt: Prompt) -> float:
    return min(prompt.budgets.total_s, TOTAL_S_MAX)
