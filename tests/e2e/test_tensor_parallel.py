"""Two vLLM engines with two ranks each, a daemon of its own for either: every rank's pages arrive, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from benchmarks import tiny
from benchmarks.harness.measure import prompt_of
from benchmarks.harness.rig import PATIENT, START_S, Part, Rig, post, rig_in, stats, unleased
from pdx.client import DaemonClient
from pdx.launch import processes

# The first test waits for the engines' start: eight processes on two cores.
pytestmark = [pytest.mark.vllm, pytest.mark.prove, pytest.mark.timeout(1200)]

RANKS = 2
LAYERS, BLOCK_TOKENS, CHUNK_TOKENS = 4, 128, 256
FLAGS = (
    *("--tensor-parallel-size", str(RANKS), "--max-num-batched-tokens", str(CHUNK_TOKENS)),
    *("--kv-cache-memory-bytes", str(16 << 20)),
)
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
DEADLINE_S = 120.0
LENGTHS = (1, 127, 128, 600)


@dataclass(frozen=True)
class System:
    rig: Rig
    decode: Part
    source: DaemonClient
    target: DaemonClient

    def counters(self) -> Counter[str]:
        return Counter(stats(self.target)["counters"])


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    model = tiny.write("plain", tmp_path_factory.mktemp("model"))
    with rig_in(model, tmp_path_factory.mktemp("rig")) as rig:
        rig.start_router(*PATIENT)
        for name in "ab":
            rig.start_daemon(name, arena="64MiB", digest_mode="true", poison="true", linger_s=str(START_S))
        prefill = rig.start_engine("P0", "prefill", "a", cpu="0-1", flags=FLAGS, offload="off")
        decode = rig.start_engine("D0", "decode", "b", cpu="0-1", flags=FLAGS, environment=ENVIRONMENT, offload="off")
        sessions = {part.process.pid for part in rig.parts}
        rig.wait_routable(2)
        # The ranks' first step takes seconds, on a busy machine longer than a handoff may.
        for engine in (prefill, decode):
            assert rig.complete(prompt_of(CHUNK_TOKENS, 0), url=engine.url, deadline_s=DEADLINE_S).status == 200
        system = System(rig, decode, rig.tool("a"), rig.tool("b"))
        assert unleased(system.source, system.target)
        yield system
    assert processes.of_sessions(sessions) == []


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_pages_of_all_ranks_arrive_and_the_answer_is_that_of_an_engine_alone(system: System, tokens: int) -> None:
    before, prompt = system.counters(), prompt_of(tokens, tokens)
    reply = system.rig.complete(prompt)
    assert reply.status == 200, reply.text
    assert reply.headers.get("x-pdx-prefill") == "P0", reply.headers
    assert unleased(system.source, system.target)
    grown = system.counters() - before
    loads = (grown["loads_ok"], grown["loads_failed"], grown["commit_mismatches"])
    assert loads == (1, 0, 0), (grown, reply.headers)
    pages = RANKS * LAYERS * -(-tokens // BLOCK_TOKENS)
    assert grown["pages_verified"] == grown["pages_landed"] == pages
    post(f"{system.decode.url}/reset_prefix_cache", {}, deadline_s=10)
    alone = system.rig.complete(prompt, url=system.decode.url)
    assert (alone.status, alone.text) == (200, reply.text)
