"""What a simulated engine keeps of one request, and its two ways out: to who asked, and to the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.simulate.host import Host, SimulatedArena
from benchmarks.simulate.prompts import Prompt, prompt_of
from benchmarks.simulate.worker import Load
from benchmarks.simulate.world import Link, Process
from pdx.daemon.sessions import Session
from pdx.layout import Place
from pdx.wire import Keep, OpenLoad, OpenSend

HTTP_S = 0.0005


@dataclass(frozen=True)
class Tie:
    """One process's attachment to one life of the daemon."""

    host: Host
    incarnation: int
    session: Session
    arena: SimulatedArena
    out: Link


@dataclass(eq=False)
class Call:
    """One HTTP request: who asks, and how to tell them. `tell(kind, body)`: "answer", "stream", "end" or "broke"."""

    asker: Process
    tell: Callable[[Call, str, Any], None]
    number: int
    dropped: bool = False

    def reply(self, kind: str, body: Any) -> None:
        if not self.dropped:
            self.asker.later(HTTP_S, self._arrive, kind, body)

    def _arrive(self, kind: str, body: Any) -> None:
        if not self.dropped:
            self.tell(self, kind, body)


@dataclass(eq=False)
class Work:
    """One request in the engine. `phase`: asking -> (loading ->) computing -> saying -> gone."""

    request_id: str
    call: Call
    tokens: tuple[int, ...]
    wanted: int  # tokens to say
    stream: bool
    phase: str = "computing"
    prompt: Prompt | None = None  # as far as it is handed over
    handoff_id: bytes = b""
    early: bool = False  # asked beside prefill
    question: OpenSend | OpenLoad | Keep | None = None
    deadline: float = 0.0
    load_budget_s: float = 0.0
    ask_again_at: float | None = None
    places: list[Place | None] | None = None
    arena: SimulatedArena | None = None  # that of `places`
    touching: bool = False  # whether the arena has been told that we may touch them
    incarnation: int = 0
    unsaved: list[int] | None = None
    handed_over: str = ""  # the handoff, once all that was to be saved is
    computed: int = 0  # leading blocks
    last_step: int = 0
    load: Load | None = None
    said: int = 0
    aborted: bool = False

    @property
    def side(self) -> Literal["send", "load"]:
        return "load" if isinstance(self.question, OpenLoad) else "send"


def lot_of(work: Work, said: Sequence[int], *, lot_id: bytes, deadline: float) -> Work | None:
    """A request that came by a handoff is over: the whole blocks of its answer are to be kept. None if there are none.

    It lives on without its asker, until its pages are saved or the daemon says no.
    """
    assert work.prompt is not None
    whole = prompt_of((*work.tokens, *said[:-1]))  # nobody computes the last token
    hashes = whole.block_hashes[len(work.prompt.block_hashes) :]
    if not hashes:
        return None
    keep = Keep(request_id=f"{work.request_id}/lot", handoff_id=lot_id, block_hashes=hashes, origin=work.handoff_id)
    nobody = Call(work.call.asker, work.call.tell, work.call.number, dropped=True)
    return Work(
        keep.request_id, nobody, (), 0, False, phase="asking", handoff_id=lot_id, question=keep, deadline=deadline
    )
