"""A tiny model with sliding windows and an adapter on a prefill and a decode vLLM engine, each with its own daemon.

Six layers in three KV groups, two of which forget what is behind their window. A request with a `cache_salt` finds
nothing anywhere, so it is computed by one engine alone. What other kinds of KV cache do is in benchmarks/layouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny
from benchmarks.harness.measure import prompt_of
from benchmarks.harness.rig import START_S, Part, Reply, Rig, post, rig_in, stats, unleased
from pdx.client import DaemonClient
from pdx.launch import processes

pytestmark = [pytest.mark.vllm, pytest.mark.prove, pytest.mark.timeout(1200)]

LAYERS, WINDOWED_LAYERS, BLOCK_TOKENS = 6, 4, 128
FLAGS = (*tiny.FLAGS, "--max-num-batched-tokens", "512", "--enable-lora")


@dataclass(frozen=True)
class System:
    rig: Rig
    decode: Part
    source: DaemonClient
    target: DaemonClient

    def alone(self, prompt: list[int], **more: Any) -> str:
        reply = self.rig.complete(prompt, url=self.decode.url, cache_salt="alone", **more)
        assert reply.status == 200, reply.text
        return reply.text

    def counters(self) -> Counter[str]:
        return Counter(stats(self.target)["counters"])

    def hand_over(self, prompt: list[int], **more: Any) -> tuple[Reply, Counter[str]]:
        """The answer through the pair, and what the decode side's daemon counted meanwhile."""
        before = self.counters()
        reply = self.rig.complete(prompt, **more)
        assert reply.status == 200, reply.text
        assert (reply.headers.get("x-pdx-prefill"), reply.headers.get("x-pdx-decode")) == ("P0", "D0")
        assert unleased(self.source, self.target)
        grown = self.counters() - before
        assert (grown["loads_ok"], grown["loads_failed"]) == (1, 0)
        return reply, grown


@pytest.fixture(scope="module")
def system(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("tiny")
    hybrid = tiny.write("hybrid", folder / "hybrid")
    one, other = (tiny.write_adapter(folder / f"adapter{seed}", seed=seed) for seed in range(2))
    with rig_in(hybrid, tmp_path_factory.mktemp("rig")) as rig:
        rig.start_router()
        for name in "ab":
            rig.start_daemon(name, arena="256MiB", digest_mode="true", poison="true", linger_s=str(START_S))
        rig.start_engine("P0", "prefill", "a", cpu=0, flags=(*FLAGS, "--lora-modules", f"same={one}", f"differs={one}"))
        decode = rig.start_engine(
            "D0", "decode", "b", cpu=1, environment={"VLLM_SERVER_DEV_MODE": "1"},
            flags=(*FLAGS, "--lora-modules", f"same={one}", f"differs={other}"),
        )  # fmt: skip
        sessions = {part.process.pid for part in rig.parts}
        rig.wait_routable(2)
        system = System(rig, decode, rig.tool("a"), rig.tool("b"))
        assert unleased(system.source, system.target)
        yield system
    assert processes.of_sessions(sessions) == []


@pytest.mark.parametrize("count", [60, 199, 327, 1500])
def test_decode_loads_what_it_will_look_at(system: System, count: int) -> None:
    prompt = prompt_of(count, count)
    reply, grown = system.hand_over(prompt)
    assert reply.headers["x-pdx-way"] == "seeded"
    blocks, behind = -(-count // BLOCK_TOKENS), max(0, count - tiny.WINDOW + 1) // BLOCK_TOKENS
    assert grown["pages_landed"] == LAYERS * blocks
    assert grown["pages_verified"] == LAYERS * blocks - WINDOWED_LAYERS * behind
    assert reply.text == system.alone(prompt)


def test_a_paired_request_loads_all_but_its_last_token(system: System) -> None:
    """327 tokens: had it all, vLLM would take a block of null for what the last token looks back to."""
    prompt = prompt_of(327, 7)
    reply, _ = system.hand_over(prompt, presence_penalty=0.1)
    assert reply.headers["x-pdx-way"] == "paired"
    assert reply.text == system.alone(prompt, presence_penalty=0.1)


def test_the_next_turn_needs_blocks_that_prefill_has_forgotten(system: System) -> None:
    """Its own cache has but the window of the first turn; its daemon has all of it."""
    first = prompt_of(1000, 2)
    system.hand_over(first)
    second = [*first, *prompt_of(300, 3)]
    reply, grown = system.hand_over(second)
    assert reply.usage["prompt_tokens"] == 1300
    assert grown["pages_landed"] == LAYERS * (11 - 7), "the first turn's blocks are there already"
    assert reply.text == system.alone(second)


def test_what_left_the_engine_s_cache_is_loaded(system: System) -> None:
    prompt = prompt_of(1000, 4)
    computed = system.rig.complete(prompt, url=system.decode.url).text
    assert unleased(system.target)
    before = system.counters()
    post(f"{system.decode.url}/reset_prefix_cache", {}, deadline_s=10)
    assert system.rig.complete(prompt, url=system.decode.url).text == computed
    grown = system.counters() - before
    assert (grown["lookup_hit_blocks"], grown["loads_ok"], grown["loads_failed"]) == (7, 1, 0)
    assert grown["pages_verified"] == LAYERS * 7 - WINDOWED_LAYERS * ((7 * 128 - tiny.WINDOW + 1) // 128)
    assert unleased(system.target)


def test_an_adapter_has_pages_of_its_own(system: System) -> None:
    prompt = prompt_of(700, 5)
    plain, _ = system.hand_over(prompt)
    adapted, grown = system.hand_over(prompt, model="same")
    assert grown["pages_landed"] == LAYERS * 6
    assert plain.text == system.alone(prompt)
    assert adapted.text == system.alone(prompt, model="same")
    assert adapted.text != plain.text


def test_one_name_for_two_adapters_is_never_paired(system: System) -> None:
    prompt = prompt_of(300, 6)
    reply = system.rig.complete(prompt, model="differs")
    assert (reply.status, reply.headers.get("x-pdx-prefill"), reply.headers["x-pdx-decode"]) == (200, None, "D0")
    assert reply.text == system.alone(prompt, model="differs")
