"""Answers decode engines that ask for the KV of a request: what is here, what will be, or "wait", or "absent".

A question that came after prefill's reply finds its handoff here, or about to be. An *early* one came beside prefill's
request: it is kept while it has no answer, which then goes out by itself. It is answered when the first page of its
handoff is here, so that the engine keeps no blocks for what is still in prefill's queue; and its wait has an end,
because the handoff has one: within its budgets it begins, or fails, or stays unknown.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pdx.buffer.lease import Owner
from pdx.daemon.grips import Grip, Grips
from pdx.daemon.ports import Desk, HandoffKey, namespace_for
from pdx.daemon.receiving import Incoming, ReceivingHalves
from pdx.daemon.sessions import Engine
from pdx.errors import HandleError
from pdx.handoff.handle import TransferHandle
from pdx.handoff.states import Receiving
from pdx.layout import Place
from pdx.wire import LetGo, LoadOpened, OpenLoad

# A decode request may overtake its RESERVE by the time a connection takes; an id unknown for longer is absent.
UNKNOWN_HANDOFF_WAIT_S = 0.5
FORGET_ASKED_S = 10.0
# One for each request that a router keeps in flight; the engines of those beyond ask again by themselves.
EARLY_MAX = 4096


@dataclass(frozen=True)
class Question:
    """An OPEN_LOAD whose handle is good."""

    engine: Engine
    message: OpenLoad
    handle: TransferHandle
    asked_at: float

    @property
    def key(self) -> HandoffKey:
        return self.handle.handoff_id, self.handle.attempt

    @property
    def patience_s(self) -> float:
        """How long its handoff may be unknown. A prefill engine in a long step hears of its request after it."""
        return self.handle.budgets.grant_s if self.message.early else UNKNOWN_HANDOFF_WAIT_S


class Questions:
    """All of them. Owned by the control thread."""

    def __init__(self, desk: Desk, grips: Grips, halves: ReceivingHalves) -> None:
        self._desk = desk
        self._grips = grips
        self._halves = halves
        self._first_asked: OrderedDict[bytes, float] = OrderedDict()  # the oldest comes first
        self._early: dict[HandoffKey, Question] = {}

    def ask(self, engine: Engine, message: OpenLoad, now: float) -> TransferHandle | None:
        """Answers at once; after a "wait" an early question is answered again, any other asks again.

        Returns the handle if it is good.
        """
        try:
            handle = self._desk.verified(message.handle, daemon="decode_daemon")
            if handle.decode_engine != engine.info.engine_id:
                raise HandleError(f"handle is for engine {handle.decode_engine!r}")
        except HandleError as error:
            self._desk.ports.counters["handles_refused"] += 1
            self._answer(engine, message, b"", "absent", reason=f"handle refused: {error}")
            return None
        asked_at = self._first_asked.setdefault(handle.handoff_id, now)
        question = Question(engine, message, handle, asked_at)
        question = self._early.pop(question.key, question)
        why = self._undecided(question, now)
        if not why:
            self._decide(question, now)
            return handle
        if message.early and len(self._early) < EARLY_MAX:
            self._early[question.key] = question
        self._answer(engine, message, handle.handoff_id, "wait", reason=why)
        return handle

    def withdrawn(self, engine_id: str, message: LetGo, now: float) -> None:
        """The engine no longer waits for the answer to an early question: its handoff is of use to nobody."""
        for question in [q for q in self._early.values() if q.handle.handoff_id == message.handoff_id]:
            if question.engine.info.engine_id == engine_id:
                del self._early[question.key]
                record = self._halves.records.get(question.key)
                if record is not None:
                    reason = f"decode engine: {message.reason}"
                    self._halves.act(record, record.receiver.fail(reason, tell_peer=True), now)

    def forget(self, engine_id: str) -> None:
        """Nobody is left to hear this engine's answers."""
        self._early = {k: q for k, q in self._early.items() if q.engine.info.engine_id != engine_id}

    def tick(self, now: float) -> None:
        """Answers those early ones whose handoffs have been stirred since the last call."""
        stirred, self._desk.stirred = self._desk.stirred, {}
        self._answer_decided([self._early[key] for key in stirred if key in self._early], now)

    def look(self, now: float) -> None:
        """At all of them, for time decides too."""
        self._answer_decided(list(self._early.values()), now)
        while self._first_asked and now - next(iter(self._first_asked.values())) >= FORGET_ASKED_S:
            self._first_asked.popitem(last=False)

    # --- answers ----------------------------------------------------------------------------------------------

    def _answer_decided(self, early: list[Question], now: float) -> None:
        for question in early:
            if not self._undecided(question, now):
                del self._early[question.key]
                self._decide(question, now)

    def _undecided(self, question: Question, now: float) -> str:
        """Why this question can't be answered yet; empty if it can."""
        record = self._halves.records.get(question.key)
        if record is None:
            unknown = question.key not in self._desk.tombstones
            return "not reserved yet" if unknown and now - question.asked_at < question.patience_s else ""
        if record.receiver.state is Receiving.WAITING:
            return "the arena is full"
        early = question.message.early and record.receiver.state is Receiving.GRANTED
        return "no page has landed yet" if early and not record.receiver.begun else ""

    def _decide(self, question: Question, now: float) -> None:
        record = self._halves.records.get(question.key)
        if record is None:
            self._from_cache(question, now)
        else:
            self._from_handoff(question, record, now)

    def _from_handoff(self, question: Question, record: Incoming, now: float) -> None:
        engine, message = question.engine, question.message
        reserve, handoff_id = record.reserve, record.key[0]
        same = message.block_hashes == reserve.block_hashes and message.tail_hash == reserve.tail_hash
        common = record.receiver.blocks if same else _common(message.block_hashes, reserve.block_hashes)
        if record.namespace != namespace_for(engine, message.tenant):
            common = 0  # of another tenant, or of other weights: not these blocks, whatever their hashes
        sender_failed = record.paired is not None and record.paired.sender.reason != ""
        taken = self._grips.get(handoff_id, "load") is not None  # by a look-up under this very name
        if taken or not common or record.claim is None or sender_failed or not record.receiver.engine_opened():
            self._answer(engine, message, handoff_id, "absent", reason=record.receiver.reason or "another prompt")
            return
        engine_id = engine.info.engine_id
        lease = self._desk.store.lease(
            record.claim, Owner("session", engine_id), now=now, ttl_s=self._desk.ports.lease_s
        )
        places = record.places[:common]
        self._grips.add(Grip(handoff_id, "load", engine_id, lease, record.key, places, request_id=message.request_id))
        self._desk.trace(record.key, "open_load", places=common)
        self._answer(engine, message, handoff_id, "granted", places=places)

    def _from_cache(self, question: Question, now: float) -> None:
        """There is no such handoff, and won't be: serve what the cache has of the prompt."""
        engine, message, handoff_id = question.engine, question.message, question.key[0]
        if question.key not in self._desk.tombstones:
            self._desk.bury(question.key, "never reserved")
        reason = self._desk.tombstones[question.key] or "over"
        if self._grips.get(handoff_id, "load") is not None:
            self._answer(engine, message, handoff_id, "absent", reason=reason)
            return
        owner = Owner("session", engine.info.engine_id)
        read = self._desk.store.read(
            owner, namespace_for(engine, message.tenant), message.block_hashes, now=now, ttl_s=self._desk.ports.lease_s
        )
        if read is None:
            self._answer(engine, message, handoff_id, "absent", reason=reason)
            return
        grip = Grip(
            handoff_id, "load", engine.info.engine_id, read.lease, places=read.places, request_id=message.request_id
        )
        self._grips.add(grip)
        self._answer(engine, message, handoff_id, "granted", places=read.places)

    def _answer(
        self,
        engine: Engine,
        message: OpenLoad,
        handoff_id: bytes,
        status: Literal["granted", "wait", "absent"],
        *,
        places: Sequence[Place] = (),
        reason: str = "",
    ) -> None:
        answer = LoadOpened(
            request_id=message.request_id, handoff_id=handoff_id, status=status, places=list(places), reason=reason
        )
        self._desk.ports.to_engine(engine.info.engine_id, answer)


def _common(ours: Sequence[bytes], theirs: Sequence[bytes]) -> int:
    """How many leading hashes agree."""
    pairs = zip(ours, theirs, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
