"""Two torch engines on real pdxd processes: answers equal those of a lone engine, whatever happens on the way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch", reason="torch is not installed: no engine to test with")

from daemon.fleet import Daemon, fleet_in, until
from daemon_pair import MODEL, PROMPTS, Pair, alone, play, prompts
from device_pair import device_mover_of, gpu_mover_of
from lanes_here import needing
from torch_engine import Model
from torch_peer import MoverOf

from pdx.client import DaemonClient
from pdx.wire import Ask, Attach


@pytest.fixture(autouse=True, scope="module")
def gpu_at_work() -> None:
    """What CUDA opens once in a process is no leak of the first test that uses it."""
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, pin_memory=True).to("cuda")


ON_GPU = ("gpu, staged", "gpu, straight")


WAYS = ["tcp", "same daemon", "device", *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)]


@pytest.fixture(params=WAYS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with fleet_in(tmp_path) as fleet:
        # On a busy machine NIXL takes seconds to start: the first daemon must not leave before the second is there.
        transport, linger_s = ("nixl", "60") if request.param == "nixl" else ("auto", "2")
        source = fleet.daemon(transport=transport, linger_s=linger_s)
        target = source if request.param == "same daemon" else fleet.daemon(transport=transport, linger_s=linger_s)
        model = Model(device="cuda") if request.param in ON_GPU else MODEL
        mover_of: MoverOf | None = device_mover_of if request.param == "device" else None
        if request.param in ON_GPU:
            mover_of = partial(gpu_mover_of, folder=tmp_path / "kernels", straight=request.param == ON_GPU[1])
        pair = Pair(fleet, source, target, model=model, mover_of=mover_of)
        try:
            yield pair
        finally:
            pair.close()


@pytest.mark.parametrize(
    "pair", [*WAYS, pytest.param("nixl", marks=[*needing("nixl"), pytest.mark.prove])], indirect=True
)
def test_answers_are_those_of_a_lone_engine(pair: Pair) -> None:
    generator = random.Random(1)
    texts = prompts(generator)
    play(pair, texts, generator, preempt=0.1)
    pair.settle()
    assert pair.wrong(texts) == []
    for daemon in pair.fleet.daemons:
        daemon.wait_unleased()
    counters = pair.daemons["decode"].stats()["counters"]
    assert counters["loads_ok"] == PROMPTS
    assert counters.get("loads_failed", 0) == 0
    assert counters["pages_verified"] > 0
    taken = {name for name, count in pair.daemons["prefill"].stats()["counters"].items() if count and "_by_" in name}
    assert len(taken) == 1, taken
    if pair.daemons["prefill"].config.transport != "auto":
        assert taken == {"handoffs_by_nixl"}


def test_decode_computes_nothing_but_the_last_token(pair: Pair) -> None:
    texts = {0: list(range(37))}
    answer = pair.ask(0, texts[0])
    while pair.prefill.engine.unfinished:
        pair.step()
    answer()
    pair.settle()
    assert pair.wrong(texts) == []
    assert pair.decode.engine.forward_tokens == 5


def test_a_spoilt_block_of_the_cache_is_computed_once_and_good_again(pair: Pair) -> None:
    """The store's bytes rot; the hit is refused, the block leaves the index, and the next handoff brings it anew."""
    texts = {n: list(range(37)) for n in (0, 2, 4)}

    def serve(number: int) -> int:
        """How many blocks did decode load and find wrong?"""
        pair.decode.engine.forget_prefixes()
        answer = pair.ask(number, texts[number])
        while pair.prefill.engine.unfinished:
            pair.step()
        answer()
        pair.settle()
        assert pair.received[number].output == alone(texts[number])
        pair.daemons["decode"].wait_unleased()
        return pair.daemons["decode"].counter("blocks_spoilt")

    assert serve(0) == 0
    spoil_one_page(pair)
    assert serve(2) == 1
    assert serve(4) == 1
    assert pair.daemons["decode"].counter("loads_failed") == 1


def spoil_one_page(pair: Pair) -> None:
    """Of those in decode's arena that decode's cache has too."""
    worker = pair.decode.clients[1]
    assert worker is not None
    assert worker.arena is not None
    everything = bytes(worker.arena.memory)
    pages = (page.tobytes() for page in pair.decode.engine.pages()[1])
    at = next(at for page in pages if any(page) and (at := everything.find(page)) >= 0)
    worker.arena.memory[at + 7] ^= 1


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_daemon_killed_in_the_middle_changes_no_answer(pair: Pair, victim: str) -> None:
    generator = random.Random(3)
    texts = prompts(generator)
    first, second = dict(list(texts.items())[:10]), dict(list(texts.items())[10:])
    answers = [pair.ask(number, tokens) for number, tokens in first.items()]
    for answer in answers[::2]:
        answer()
    daemon = pair.daemons[victim]
    for _ in range(generator.randrange(3, 9)):
        pair.step()
    daemon.kill()
    for answer in answers[1::2]:
        answer()
    pair.settle()
    assert pair.wrong(first) == []
    survivors = [other for other in pair.fleet.daemons if other is not daemon]
    for other in survivors:
        other.wait_unleased()

    # The engines have started another daemon, or will: all that is asked now goes through it.
    def attached_again() -> bool:
        pair.step()
        refs = [pair.prefill.daemon_ref, pair.decode.daemon_ref]
        return None not in refs and daemon.ref not in refs

    until(attached_again, "the engines attach to a new daemon")
    with DaemonClient.attach(pair.daemons["decode"].config, Attach(kind="tool"), start=False) as tool:
        before = loads_ok(tool)
        play(pair, second, generator, preempt=0.0)
        pair.settle()
        assert pair.wrong(second) == []
        until(lambda: loads_ok(tool) - before == len(second), "every KV came, through the new daemon")
    pair.close()
    until(lambda: not runs_in(daemon), "the new daemon lingers out")


def loads_ok(tool: DaemonClient) -> int:
    return tool.ask(Ask(verb="stats")).body["counters"].get("loads_ok", 0)


def runs_in(daemon: Daemon) -> bool:
    """Whether a daemon that is no child of ours serves this run directory."""
    flag = f"--run-dir={daemon.run_dir}"
    for process in psutil.process_iter(["cmdline", "status"]):
        if flag in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            return True
    return False
