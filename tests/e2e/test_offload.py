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
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.harness.measure import prompt_of
from benchmarks.harness.rig import START_S, Part, Reply, Rig, counter, post, rig_in, stats, unleased, wait_until
from pdx.admin import ClearRequest, LookupRequest
from pdx.client import DaemonClient
from pdx.kv import LocalKv
from pdx.launch import processes
from pdx.verbs import Cleared, Found
from pdx.wire import Attach

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

LAYERS, BLOCK_TOKENS = 30, 128
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
PROMPT_TOKENS = 5 * BLOCK_TOKENS + 40
WHOLE = PROMPT_TOKENS // BLOCK_TOKENS
# Bounds of hangs, no claims of speed: on a machine whose cores others had taken, one step has needed 50 s.
DEADLINE_S = 240.0
LASTING = {"lookup_s": str(DEADLINE_S), "lease_s": str(DEADLINE_S)}


@dataclass
class Host:
    rig: Rig
    engine: Part
    tool: DaemonClient

    def ask(self, prompt: list[int], max_tokens: int = 8, **more: Any) -> Reply:
        reply = self.rig.complete(
            prompt, url=self.engine.url, max_tokens=max_tokens, deadline_s=DEADLINE_S, logprobs=5, **more
        )
        assert reply.status == 200, reply.text
        return reply

    def hit(self, prompt: list[int]) -> Reply:
        """The answer where the engine itself has the prompt's whole blocks."""
        self.ask(prompt)
        reply = self.ask(prompt)
        assert cached_tokens(reply) == WHOLE * BLOCK_TOKENS
        return reply

    def forget(self, query: str = "") -> None:
        """The engine's own cache."""
        assert post(f"{self.engine.url}/reset_prefix_cache{query}", {}, deadline_s=DEADLINE_S).status == 200

    def reload(self, model: Path) -> None:
        """The weights of this folder, in the engine as it runs."""
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
        assert post(f"{self.engine.url}/collective_rpc", rpc, deadline_s=DEADLINE_S).status == 200

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
            disk_cap="1GiB", **LASTING,
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
    costs = stats(host.tool)["costs"]
    assert costs["tokens_per_s"]["E0"] > 0 and costs["arena_bytes_per_s"]["E0"] > 0, "both sides are measured"


def test_what_was_generated_is_kept(host: Host) -> None:
    before = host.counters()
    host.ask(prompt_of(BLOCK_TOKENS + 20, 2), max_tokens=BLOCK_TOKENS)  # the second block becomes whole on the way
    assert unleased(host.tool, deadline_s=DEADLINE_S)
    assert host.grown(before, "blocks_kept") == 2


LONG = "The manual says on every page that safety comes first. " * 40
CHAT = [{"role": "system", "content": LONG}, {"role": "user", "content": "What comes first?"}]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("completions", {"text": LONG}),
        pytest.param("completions", {"tokens": prompt_of(PROMPT_TOKENS, 4)}, marks=pytest.mark.prove),
        pytest.param("completions", {"text": "A tenant's. " + LONG, "cache_salt": "alice"}, marks=pytest.mark.prove),
        pytest.param("chat/completions", {"messages": CHAT}, marks=pytest.mark.prove),
        ("chat/completions", {"messages": CHAT, "cache_salt": "alice"}),
    ],
    ids=["text", "tokens", "salted", "chat", "salted chat"],
)
def test_lookup_says_what_the_next_request_gets(host: Host, path: str, said: dict[str, Any]) -> None:
    salt = {name: said[name] for name in ("cache_salt",) if name in said}
    ways = {"messages": said["messages"]} if "messages" in said else {"prompt": said.get("text", said.get("tokens"))}
    # Its prompt is kept in the steps after the first: there must be some.
    body = {"model": str(host.rig.model), "max_tokens": 16, "temperature": 0, **ways, **salt}

    def ask() -> None:
        reply = post(f"{host.engine.url}/v1/{path}", body, deadline_s=120)
        assert reply.status == 200, reply.text
        assert unleased(host.tool, deadline_s=30)

    with LocalKv.open(host.rig.settings_of("a")) as kv:

        def found(**changed: str) -> Found:
            report = kv.lookup(LookupRequest(**{**said, **changed}))
            assert report.prompt_tokens is not None and report.prompt_tokens > 3 * BLOCK_TOKENS
            (result,) = report.daemons[0].results
            assert isinstance(result, Found)
            return result

        assert found().blocks == 0
        ask()
        told = found()
        assert told.blocks >= 3
        assert found(cache_salt="bob").blocks == 0
        before = host.counters()
        host.forget()
        assert found() == told, "nothing has come or gone"
        ask()
        assert host.grown(before, "lookup_hit_blocks") == told.blocks
        (cleared,) = kv.clear(ClearRequest(**said)).daemons[0].results
        assert isinstance(cleared, Cleared) and cleared.arena.blocks == told.blocks
        before = host.counters()
        host.forget()
        assert found().blocks == 0
        ask()
        assert host.grown(before, "lookup_hit_blocks") == 0


def test_new_weights_find_nothing_old_and_share_what_is_theirs(host: Host, tmp_path: Path) -> None:
    """In vLLM's order, the reset before the weights; and then without a reset of ours. What a tenant's first request
    computes is what these weights say: nobody has computed for it before."""
    prompt = prompt_of(PROMPT_TOKENS, 5)
    first = host.ask(prompt)
    assert unleased(host.tool, deadline_s=DEADLINE_S)
    before = host.counters()
    host.forget("?reset_external=true")
    wait_until(lambda: host.grown(before, "blocks_cleared") >= WHOLE, DEADLINE_S, "what was kept is cleared")
    host.reload(perturbed(host.rig.model, tmp_path))
    changed = host.ask(prompt)
    assert host.grown(before, "lookup_hit_blocks") == 0
    assert changed.logprobs != first.logprobs
    assert_same(changed, host.ask(prompt, cache_salt="nobody's"))
    assert unleased(host.tool, deadline_s=DEADLINE_S)
    before = host.counters()
    host.forget()
    loaded = host.ask(prompt)
    assert host.grown(before, "lookup_hit_blocks") == host.grown(before, "pages_verified") / LAYERS == WHOLE
    assert_same(loaded, host.ask(prompt))  # by now its own cache has them

    host.forget()
    host.reload(host.rig.model)
    before = host.counters()
    back = host.ask(prompt)
    assert (host.grown(before, "loads_ok"), host.grown(before, "loads_failed")) == (0, 1)
    assert_same(back, first)
    assert host.counters()["weight_changes"] == 2
    host.forget()
    assert_same(host.ask(prompt), first)
    assert unleased(host.tool, deadline_s=DEADLINE_S)
    host.forget()
    before = host.counters()
    host.ask(prompt)
    assert host.grown(before, "lookup_hit_blocks") == WHOLE


def perturbed(model: Path, folder: Path) -> Path:
    """The same model with other keys."""
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if "k_proj" in name:
            tensor.mul_(0.75)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.prove
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
