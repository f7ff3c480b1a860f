"""Two torch engines on real pdxd processes, and what is asked of them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from daemon.fleet import Daemon, Fleet
from torch_engine import VOCABULARY, Model, Request, TorchEngine
from torch_peer import MoverOf, TorchPeer

from pdx.config import Offload
from pdx.handoff.handle import TransferHandle, mint
from pdx.wire import Budgets

DEADLINE_S = 120.0  # bounds a hang: a busy machine may be slow
PROMPTS = 20
BUDGETS = Budgets(grant_s=2.0, slab_s=2.0, total_s=10.0, claim_s=1.0)
MODEL = Model()


class Pair:
    """Prefill and decode, stepped in turns by one thread as two busy engines would step by themselves."""

    def __init__(
        self,
        fleet: Fleet,
        source: Daemon,
        target: Daemon,
        *,
        ranks: int = 1,
        alike: bool = False,
        budgets: Budgets = BUDGETS,
        model: Model = MODEL,
        mover_of: MoverOf | None = None,
        offload: Offload = "off",
    ) -> None:
        self.fleet = fleet
        self.budgets = budgets
        self.daemons = {"prefill": source, "decode": target}
        engines = [TorchEngine(model, blocks=512, ranks=ranks, alike=alike) for _ in range(2)]
        self.prefill = TorchPeer(engines[0], source.config, "P", "prefill", mover_of=mover_of, offload=offload)
        self.decode = TorchPeer(engines[1], target.config, "D", "decode", mover_of=mover_of, offload=offload)
        self.is_slow = False  # as real engines are: what a step asks is answered before the next
        self.sent: dict[int, Request] = {}
        self.received: dict[int, Request] = {}

    def ask(self, number: int, tokens: list[int], *, answer_tokens: int = 5) -> Callable[[], None]:
        """Gives the prompt to prefill; what is returned gives it to decode, as the router does at once or later.

        Beside prefill two of three are asked for early; behind it every other one goes on from its first token.
        """
        source, target = self.prefill.daemon_ref, self.decode.daemon_ref
        assert source is not None
        assert target is not None
        handle = TransferHandle(
            handoff_id=os.urandom(16), attempt=1, prefill_engine="P", decode_engine="D", prefill_daemon=source,
            decode_daemon=target, budgets=self.budgets, issued_unix_s=time.time(),
        )  # fmt: skip
        text = mint(handle, self.fleet.key_file.read_bytes())
        self.sent[number] = self.prefill.send(f"p{number}", tokens, text)

        def answer() -> None:
            sent = self.sent[number]
            if sent.status != "finished":
                self.received[number] = self.decode.load(f"d{number}", tokens, text, early=number % 3 > 0)
            elif number % 2:
                self.received[number] = self.decode.load(
                    f"d{number}", [*tokens, *sent.output], text, max_tokens=4, covered=len(tokens)
                )
            else:
                self.received[number] = self.decode.load(f"d{number}", tokens, text, max_tokens=answer_tokens)

        return answer

    def step(self) -> None:
        for engine in (self.prefill.engine, self.decode.engine):
            engine.step()
            if self.is_slow:
                _wait_for_answers(engine)

    def settle(self) -> None:
        """Until both engines are done, and one step more: the one in which vLLM tells of finished requests."""
        end = time.monotonic() + DEADLINE_S
        while self.prefill.engine.unfinished or self.decode.engine.unfinished:
            assert time.monotonic() < end, "the engines do not come to an end"
            self.step()
        self.step()

    def wrong(self, texts: dict[int, list[int]]) -> list[int]:
        return [n for n, tokens in texts.items() if self.received[n].tokens[len(tokens) :] != alone(tokens)]

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


def _wait_for_answers(engine: TorchEngine) -> None:
    scheduler, deadline = engine.scheduler, time.monotonic() + DEADLINE_S
    assert scheduler is not None
    while scheduler._sends.unanswered(engine.requests):
        assert time.monotonic() < deadline, "an offer is not answered"
        scheduler._hear(0.01)


def alone(tokens: list[int]) -> list[int]:
    engine = TorchEngine(MODEL)
    request = engine.add(Request("alone", tokens, max_tokens=5))
    while engine.unfinished:
        engine.step()
    return request.output


def prompts(generator: random.Random) -> dict[int, list[int]]:
    """Every other one begins with a part of the same text."""
    shared = [generator.randrange(VOCABULARY) for _ in range(30)]
    texts = {}
    for number in range(PROMPTS):
        start = shared[: generator.randrange(8, 30)] if number % 2 else []
        texts[number] = start + [generator.randrange(VOCABULARY) for _ in range(generator.randrange(1, 40))]
    return texts


def play(pair: Pair, texts: dict[int, list[int]], generator: random.Random, *, preempt: float) -> None:
    """Prompts arrive some steps apart; decode hears of each at once or only after prefill is done."""
    waiting: list[tuple[int, Callable[[], None], bool]] = []
    to_ask = dict(texts)
    end = time.monotonic() + DEADLINE_S
    while to_ask or waiting:
        assert time.monotonic() < end, f"prompts {[n for n, _, _ in waiting]} are not prefilled"
        if to_ask and generator.random() < 0.5:
            number = min(to_ask)
            waiting.append((number, pair.ask(number, to_ask.pop(number)), generator.random() < 0.5))
        for entry in list(waiting):
            number, answer, early = entry
            if early or pair.sent[number].status == "finished":
                answer()
                waiting.remove(entry)
        for engine in (pair.prefill.engine, pair.decode.engine):
            running = [request for request in engine.requests.values() if request.status == "running"]
            if running and generator.random() < preempt:
                engine.preempt(generator.choice(running))
                if generator.random() < 0.5:
                    engine.forget_prefixes()
        pair.step()
