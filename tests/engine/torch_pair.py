"""Two torch engines on one daemon in memory, and what tests of the pair ask of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from memory_daemon import Clock, MemoryAttachment, MemoryDaemon
from torch_engine import BLOCK_TOKENS, LAYOUT, NUMBERED, VOCABULARY, Model, Request, TorchEngine

from pdx.config import LOOKUP_S, Offload
from pdx.engine.host_mover import HostMover
from pdx.engine.link import Link
from pdx.engine.vllm.scheduler_side import SchedulerSide
from pdx.engine.vllm.worker_side import WorkerSide
from pdx.wire import Budgets, LetGo, Role

STEPS_MAX = 400
PREFILL_SCHEDULER, PREFILL_WORKER, DECODE_SCHEDULER, DECODE_WORKER = range(4)  # in order of attaching


@dataclass
class Side:
    engine: TorchEngine
    scheduler_line: MemoryAttachment
    worker_line: MemoryAttachment

    def move_to(self, daemon: MemoryDaemon | None) -> None:
        self.scheduler_line.daemon = self.worker_line.daemon = daemon


def side(
    daemon: MemoryDaemon,
    role: Role,
    clock: Clock,
    *,
    tokens_a_step: int = 10,
    offload: Offload = "off",
    lookup_s: float = LOOKUP_S,
) -> Side:
    engine = TorchEngine(Model(), tokens_a_step=tokens_a_step)
    lines = MemoryAttachment(daemon), MemoryAttachment(daemon)
    links = [Link(line) for line in lines]  # type: ignore[arg-type]
    for link in links:
        link.client()
    scheduler = SchedulerSide(
        links[0], role=role, layout=LAYOUT, block_tokens=BLOCK_TOKENS, offload=offload, lookup_s=lookup_s, clock=clock
    )
    mover = HostMover(engine.pages(), LAYOUT)
    engine.connect(scheduler, WorkerSide(links[1], NUMBERED, LAYOUT, mover, watch=engine.watches[0], clock=clock))
    return Side(engine, *lines)


def prompt(seed: int, tokens: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCABULARY) for _ in range(tokens)]


def sending(daemon: MemoryDaemon, tokens: list[int], number: int = 1) -> Request:
    parameters = {"do_remote_decode": True, "pdx_handle": daemon.handle(number)}
    return Request(f"p{number}", tokens, parameters)


def loading(daemon: MemoryDaemon, tokens: list[int], number: int = 1, *, budgets: Budgets | None = None) -> Request:
    parameters = {"do_remote_prefill": True, "pdx_handle": daemon.handle(number, budgets=budgets)}
    return Request(f"d{number}", tokens, parameters, max_tokens=5)


def run(engine: TorchEngine) -> None:
    for _ in range(STEPS_MAX):
        if not engine.unfinished:
            break
        engine.step()
    assert not engine.unfinished
    engine.step()  # the step in which vLLM tells its worker of finished requests


def alone(tokens: list[int]) -> list[int]:
    engine = TorchEngine(Model())
    request = engine.add(Request("alone", tokens, max_tokens=5))
    run(engine)
    return request.output


def last_let_go(daemon: MemoryDaemon, which: str, number: int = 1) -> LetGo:
    ends = [m for m in daemon.let_go if m.side == which and m.handoff_id == number.to_bytes(16, "big")]
    assert len(ends) == 1, f"{which} ended {len(ends)} times"
    return ends[0]
