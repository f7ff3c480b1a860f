"""The scheduler's view of what is saved: for a handoff, or for whoever asks for the same tokens later.

Theory of operation. A request is in `_sends` from its OPEN_SEND until it needs nothing more from here: without a plan
it waits for the daemon's answer (vLLM is told "ask again"), with one its pages are saved as they become whole. The last
pages leave with `last` set, and the *worker* says LET_GO after them: on its own connection, so that the daemon cannot
hear it before the FILLED messages it belongs to. All other ends are told by us. A request that is in no table is
served like any other.

Without a handle nothing waits: blocks are *offered* (KEEP) and saved in the next step after the daemon has made room.
A request that is followed offers its blocks as they become whole, one lot after the other.

A block whose pages some layers have forgotten (it is behind their window, and came from the engine's prefix cache) can
not be saved: its handoff, or what is kept of its request, ends there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdx.engine.link import Link
from pdx.engine.plan import NO_BLOCK, SendPlan, fits
from pdx.engine.vllm.names import Names
from pdx.engine.vllm.prompts import Prompt, blocks_of
from pdx.engine.vllm.steps import Save
from pdx.engine.vllm.unread import Unread
from pdx.errors import Refused
from pdx.layout import PageLayout
from pdx.wire import BLOCKS_MAX, Finished, Keep, LetGo, OpenSend, SendEnded, SendOpened

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

# Under vLLM's logger, whose handler and level the operator has set up.
log = logging.getLogger("vllm.pdx")

# The daemon answers by itself within the grant budget; this is for one that does not.
ANSWER_MARGIN_S = 2.0
GRANT_S_MAX = 60.0  # a handle is not verified yet: it must not make a request wait for ever
HANDLE_IN_USE = "another request has its handle"


@dataclass(eq=False)
class _Send:
    request: Request
    prompt: Prompt
    deadline: float
    plan: SendPlan | None = None
    last_step: int = 0  # whose worker touches our slots

    @property
    def handoff_id(self) -> bytes:
        return self.prompt.handoff_id


@dataclass(eq=False)
class _Followed:
    request: Request
    salt: bytes
    next: int  # its first block that was not offered
    tokens: float  # of which to offer blocks
    origin: bytes  # the handoff by which it came; empty: none


class Sends:
    """All outgoing requests of one engine. Owned by the scheduler's thread."""

    def __init__(self, link: Link, *, layout: PageLayout, block_tokens: int, names: Names, unread: Unread) -> None:
        self._link = link
        self._names = names
        self._unread = unread
        self._layout = layout
        self._block_tokens = block_tokens
        self._sends: dict[str, _Send] = {}
        self._asked: dict[bytes, _Send] = {}  # the same, by handoff
        self._step = 0  # the newest one planned: no later one touches slots of a handoff that is not in `_sends`
        self._results: dict[str, dict[str, Any]] = {}  # saved, for the reply of a request that still runs
        self._followed: dict[str, _Followed] = {}
        self.blocks_forgotten = 0  # before they could be saved

    def open(self, request: Request, prompt: Prompt, now: float) -> bool:
        """Asks for a claim. False without a daemon, or where another request that is here has the same handle (one of
        several answers, or of several prompts, to one POST): then the request is served as if it had none."""
        if prompt.handoff_id in self._asked:
            log.warning("request %s is served without handoff: %s", request.request_id, HANDLE_IN_USE)
            return False
        message: OpenSend | Keep
        name = self._names.of(request.request_id)
        if prompt.handle:
            message = OpenSend(
                request_id=name,
                handle=prompt.handle,
                block_hashes=prompt.block_hashes,
                prompt_tokens=prompt.tokens,
                tail_hash=prompt.tail_hash,
                tenant=prompt.tenant,
            )
        else:
            message = Keep(
                request_id=name,
                handoff_id=prompt.handoff_id,
                block_hashes=prompt.block_hashes,
                tenant=prompt.tenant,
                origin=prompt.origin,
            )
        if not self._link.send(message):
            return False
        if not prompt.handle:
            self._unread.sent(request.request_id)
        grant_s = min(prompt.budgets.grant_s, GRANT_S_MAX)
        send = _Send(request, prompt, now + grant_s + ANSWER_MARGIN_S)
        self._sends[request.request_id] = self._asked[send.handoff_id] = send
        return True

    def follow(self, request: Request, *, salt: bytes, first: int, answer: bool, origin: bytes = b"") -> None:
        """Offers the blocks of this request as they become whole, from block `first` on; with or without its answer's.

        Not before it runs: what waits in a queue must not take room for what it will have some day. Of a request that
        came by a handoff (`origin`) those before `first` are the ones that its OPEN_LOAD names.
        """
        tokens = float("inf") if answer else request.num_prompt_tokens
        self._followed[request.request_id] = _Followed(request, salt, first, tokens, origin)

    def end_all(self, reason: str) -> None:
        """Saves no more of any request that is here, and offers none."""
        self._followed.clear()
        for send in list(self._sends.values()):
            self._end(send, reason)

    def adapted(self, request_ids: Iterable[str]) -> list[Request]:
        """Those of these requests that have an adapter, and are saved or followed."""
        adapted = []
        for request_id in request_ids:
            send, followed = self._sends.get(request_id), self._followed.get(request_id)
            if send is not None and send.prompt.salt:
                adapted.append(send.request)
            elif followed is not None and followed.salt:
                adapted.append(followed.request)
        return adapted

    def drop(self, request_id: str, reason: str) -> None:
        """Saves no more of this request, and offers none."""
        self._followed.pop(request_id, None)
        send = self._sends.get(request_id)
        if send is not None:
            self._end(send, reason)

    def undecided(self, request_id: str, now: float) -> bool:
        """True while this request must not start: its claim may still come. What is only offered never delays it."""
        send = self._sends.get(request_id)
        if send is None or send.plan is not None or not send.prompt.handle:
            return False
        if now < send.deadline:
            return True
        self._end(send, "no answer from pdxd")
        return False

    def opened(self, message: SendOpened) -> None:
        self._unread.answered(message.request_id)
        send = self._sends.get(message.request_id)
        if send is None or send.plan is not None or send.handoff_id != message.handoff_id:
            self._let_go(message.handoff_id, fence=0, ok=False, reason="request is gone")
            return
        arena_bytes = self._link.arena_bytes
        if not all(place is None or fits(place, self._layout, arena_bytes) for place in message.places):
            self._end(send, "pdxd named places outside its arena")
            return
        try:
            places = [*([None] * send.prompt.first), *message.places]
            send.plan = SendPlan(places, prompt_tokens=send.prompt.tokens, block_tokens=self._block_tokens)
        except Refused as error:
            self._end(send, str(error))
            return
        if send.plan.complete:  # the store holds the whole prompt
            self._succeed(send)
            self._let_go(send.handoff_id, fence=0, ok=True, reason="")

    def ended(self, message: SendEnded) -> None:
        """The daemon wants no more pages, or never wanted any. It is always answered: our last word may be lost."""
        self._unread.answered(message.request_id)
        if message.handoff_id:
            send = self._asked.get(message.handoff_id)
        else:
            send = self._sends.get(message.request_id)
        if send is None:
            if message.handoff_id:
                self._let_go(message.handoff_id, fence=self._step, ok=False, reason="ended before")
            return
        if not send.prompt.handle:
            self._followed.pop(send.request.request_id, None)  # behind a gap, no block is of use
        else:
            log.warning("KV of %s is not handed over: %s", send.request.request_id, message.reason)
        if message.handoff_id:
            self._end(send, message.reason)
        else:
            self._remove(send)

    def saves(self, step: int, scheduled: SchedulerOutput) -> list[Save]:
        """What the worker saves in this step. Each page comes once, whatever the engine preempts in between."""
        self._step = step
        saves = []
        for request_id, send in list(self._sends.items()):
            tokens = scheduled.num_scheduled_tokens.get(request_id, 0)
            if send.plan is None or tokens == 0:
                continue
            assert scheduled.kv_connector_block_state is not None
            tables = scheduled.kv_connector_block_state.get_block_ids(request_id)
            assert tables is not None
            blocks = send.plan.step(tables, tokens_after=send.request.num_computed_tokens + tokens)
            forgotten = sum(NO_BLOCK in block_ids for _, block_ids, _ in blocks)
            if forgotten:
                self._forget(send, forgotten)
                continue
            if blocks:
                send.last_step = step
                pages = send.plan.blocks_to_save * self._layout.layers
                streamed = bool(send.prompt.handle)
                saves.append(Save(send.handoff_id, blocks, last=send.plan.complete, pages=pages, streamed=streamed))
            if send.plan.complete:
                self._succeed(send)
        return saves

    def offer(self, scheduled: SchedulerOutput) -> set[str]:
        """Offers blocks of requests that are followed. Returns these, which the daemon has yet to answer."""
        asked = set()
        for request_id, tokens in scheduled.num_scheduled_tokens.items():
            followed = self._followed.get(request_id)
            if followed is None or request_id in self._sends:
                continue
            request = followed.request
            # Of a prompt that runs, all blocks at once: each is saved in the very step that makes it whole.
            known = max(request.num_computed_tokens + tokens, request.num_prompt_tokens)
            offered = int(min(known, followed.tokens))
            if offered < (followed.next + 1) * self._block_tokens:
                continue
            if self._unread.full:
                break
            offered = min(offered, (followed.next + BLOCKS_MAX) * self._block_tokens)
            lot = blocks_of(
                request, salt=followed.salt, block_tokens=self._block_tokens, first=followed.next, tokens=offered,
                origin=followed.origin,
            )  # fmt: skip
            if lot is not None and self.open(request, lot, 0.0):
                followed.next += lot.blocks
                asked.add(request_id)
        return asked

    def unanswered(self, request_ids: Iterable[str]) -> bool:
        """Whether the daemon has not answered for some of them."""
        sends = (self._sends.get(request_id) for request_id in request_ids)
        return any(send is not None and send.plan is None for send in sends)

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """The request is over. Returns what its reply may tell."""
        followed = self._followed.get(request_id)
        self.drop(request_id, "request ended before its KV was saved")
        if followed is not None and followed.origin:
            self._link.send(Finished(handoff_id=followed.origin))
        return self._results.pop(request_id, None)

    def lost(self) -> None:
        """The daemon is gone and with it every claim. Of the next one's slots no step so far has touched any.

        What is followed is offered to the next daemon from its first block on; of handoffs that one knows nothing.
        """
        self._sends.clear()
        self._asked.clear()
        self._unread.lost()
        self._step = 0
        for followed in self._followed.values():
            followed.next, followed.origin = 0, b""

    @property
    def live(self) -> Iterable[bytes]:
        return [send.handoff_id for send in self._sends.values()]

    def _succeed(self, send: _Send) -> None:
        assert send.plan is not None
        request_id = send.request.request_id
        self._remove(send)
        if not send.prompt.handle:
            return
        pages = send.plan.blocks_to_save * self._layout.layers
        self._results[request_id] = {"handoff": send.handoff_id.hex(), "pages": pages}

    def _forget(self, send: _Send, blocks: int) -> None:
        self.blocks_forgotten += blocks
        self._followed.pop(send.request.request_id, None)  # behind a gap, no block is of use
        reason = f"{blocks} blocks came from this engine's prefix cache without what is behind their window"
        if send.prompt.handle:
            log.warning("KV of %s is not handed over: %s", send.request.request_id, reason)
        self._end(send, reason)

    def _remove(self, send: _Send) -> None:
        del self._sends[send.request.request_id]
        del self._asked[send.handoff_id]

    def _end(self, send: _Send, reason: str) -> None:
        self._remove(send)
        self._let_go(send.handoff_id, fence=send.last_step, ok=False, reason=reason)

    def _let_go(self, handoff_id: bytes, *, fence: int, ok: bool, reason: str) -> None:
        self._link.send(LetGo(handoff_id=handoff_id, side="send", fence=fence, ok=ok, reason=reason))
