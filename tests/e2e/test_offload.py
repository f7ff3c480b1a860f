"""A real vLLM engine by itself: what left its cache comes back from the arena, and from the disk after a restart.

An answer after a load is compared with the one after a hit in the engine's own cache, bit for bit. Not with the first
one: a whole prompt and the tail behind a hit are other shapes, which bf16 rounds otherwise, and of a prompt of random
tokens vLLM by itself then continues some in another way (the first two tokens of `prompt_of(PROMPT_TOKENS, 1)` are one
step of bf16 apart, or none).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.harness.measure import prompt_of
from benchmarks.harness.rig import START_S, Part, Reply, Rig, counter, post, rig_in, stats, unleased, wait_until
from pdx.client import DaemonClient
from pdx.launch import processes
from pdx.wire import Attach

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

LAYERS, BLOCK_TOKENS = 30, 128
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
PROMPT_TOKENS = 5 * BLOCK_TOKENS + 40
WHOLE = PROMPT_TOKENS // BLOCK_TOKENS
# Bounds of hangs, no claims of speed: on a machine whose cores others had taken, one step has needed 50 s.
DEADLINE_S = 240.0
PATIENT = {"lookup_s": str(DEADLINE_S), "lease_s": str(DEADLINE_S)}


@dataclass
class Host:
    rig: Rig
    engine: Part
    tool: DaemonClient

    def ask(self, prompt: list[int], max_tokens: int = 8) -> Reply:
        reply = self.rig.complete(prompt, url=self.engine.url, max_tokens=max_tokens, deadline_s=DEADLINE_S, logprobs=5)
        assert reply.status == 200, reply.text
        return reply

    def hit(self, prompt: list[int]) -> Reply:
        """The answer where the engine itself has the prompt's whole blocks."""
        self.ask(prompt)
        reply = self.ask(prompt)
        assert cached_tokens(reply) == WHOLE * BLOCK_TOKENS
        return reply

    def forget(self) -> None:
        """The engine's own cache."""
        assert post(f"{self.engine.url}/reset_prefix_cache", {}, deadline_s=DEADLINE_S).status == 200

    def grown(self, before: dict[str, int], name: str) -> int:
        return counter(self.tool, name) - before.get(name, 0)

    def counters(self) -> dict[str, int]:
        return dict(stats(self.tool)["counters"])


@pytest.fixture(scope="module")
def host(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The engine starts its daemon itself, the second one too."""
    with rig_in(model, tmp_path_factory.mktemp("rig")) as rig:
        rig.start_router()
        engine = rig.start_engine(
            "E0", "both", "a", cpu="0-1", environment=ENVIRONMENT, flags=("--enable-prompt-tokens-details",),
            arena="512MiB", digest_mode="true", poison="true", linger_s="1", disk=str(tmp_path_factory.mktemp("disk")),
            disk_cap="1GiB", **PATIENT,
        )  # fmt: skip
        sessions = {part.process.pid for part in rig.parts}
        rig.wait_routable(1)
        host = Host(rig, engine, rig.tool("a"))
        # And its connection, which ZeroMQ makes in the background, is there.
        assert unleased(host.tool, deadline_s=DEADLINE_S)
        yield host
    assert processes.of_sessions(sessions) == []


def test_a_prompt_that_left_the_engines_cache_is_loaded(host: Host) -> None:
    prompt = prompt_of(PROMPT_TOKENS, 1)
    hit = host.hit(prompt)
    before = host.counters()
    host.forget()
    assert_same(host.ask(prompt), hit)
    assert host.grown(before, "lookup_hit_blocks") == WHOLE
    assert host.grown(before, "pages_verified") == WHOLE * LAYERS
    assert (host.grown(before, "loads_ok"), host.grown(before, "loads_failed")) == (1, 0)
    assert unleased(host.tool, deadline_s=DEADLINE_S)


def test_what_was_generated_is_kept(host: Host) -> None:
    before = host.counters()
    host.ask(prompt_of(BLOCK_TOKENS + 20, 2), max_tokens=BLOCK_TOKENS)  # the second block becomes whole on the way
    assert unleased(host.tool, deadline_s=DEADLINE_S)
    assert host.grown(before, "blocks_kept") == 2


def test_a_daemon_that_was_killed_leaves_its_disk_to_the_next(host: Host) -> None:
    prompt = prompt_of(PROMPT_TOKENS, 3)
    hit = host.hit(prompt)
    assert unleased(host.tool, deadline_s=DEADLINE_S)  # what is kept is committed
    counters = ("blocks_written", "blocks_kept")
    wait_until(lambda: len({counter(host.tool, name) for name in counters}) == 1, DEADLINE_S, "all is on disk")
    host.rig.kill_daemon("a")
    settings = host.rig.settings_of("a")
    wait_until((settings.run_path / "pdxd.json").exists, START_S, "the engine has started another")
    with DaemonClient.attach(settings, Attach(kind="tool"), start=False, deadline_s=START_S) as tool:
        wait_until(lambda: any(e["complete"] for e in stats(tool)["engines"].values()), START_S, "it is attached")
        host.forget()
        assert_same(host.ask(prompt), hit)
        assert counter(tool, "blocks_promoted") == WHOLE
        assert (counter(tool, "loads_ok"), counter(tool, "loads_failed")) == (1, 0)
        assert unleased(tool, deadline_s=DEADLINE_S)


def assert_same(reply: Reply, other: Reply) -> None:
    """The same tokens, of the same probabilities: the same KV went into both."""
    assert reply.text == other.text
    assert reply.logprobs == other.logprobs
    assert reply.logprobs["top_logprobs"]


def cached_tokens(reply: Reply) -> int:
    """Of the prompt: what was computed before, here or elsewhere."""
    return int((reply.usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)
