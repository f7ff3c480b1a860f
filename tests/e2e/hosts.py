"""An engine with the daemon beside it, asked by itself: what is kept comes back, and is found.

An answer after a load is compared with the one after a hit in the engine's own cache, bit for bit. Not with the first
one: a whole prompt and the tail behind a hit are other shapes, which bf16 rounds otherwise, and of a prompt of random
tokens vLLM by itself then continues some in another way (the first two tokens of `prompt_of(PROMPT_TOKENS, 1)` are one
step of bf16 apart, or none).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import prompt_of
from benchmarks.harness.rig import Part, Reply, Rig, counter, post, stats, unleased
from pdx.admin import ClearRequest, LookupRequest
from pdx.client import DaemonClient
from pdx.kv import LocalKv
from pdx.verbs import Cleared, Found

LAYERS, BLOCK_TOKENS = 30, 128
PROMPT_TOKENS = 5 * BLOCK_TOKENS + 40
WHOLE = PROMPT_TOKENS // BLOCK_TOKENS
# Bounds of hangs, no claims of speed: on a machine whose cores others had taken, one step has needed 50 s.
DEADLINE_S = 240.0
# What an engine needs to be one.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
FLAGS = ("--enable-prompt-tokens-details",)
LASTING = {"lookup_s": str(DEADLINE_S), "lease_s": str(DEADLINE_S)}
LONG = "The manual says on every page that safety comes first. " * 40
CHAT = [{"role": "system", "content": LONG}, {"role": "user", "content": "What comes first?"}]


@dataclass
class Host:
    rig: Rig
    engine: Part
    daemon: str
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


def check_that_what_left_the_engines_cache_is_loaded(host: Host) -> None:
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
    assert costs["tokens_per_s"][host.engine.name] > 0 and costs["arena_bytes_per_s"][host.engine.name] > 0, (
        "both sides are measured"
    )


def check_that_lookup_says_what_the_next_request_gets(host: Host, path: str, said: dict[str, Any]) -> None:
    salt = {name: said[name] for name in ("cache_salt",) if name in said}
    ways = {"messages": said["messages"]} if "messages" in said else {"prompt": said.get("text", said.get("tokens"))}
    # Its prompt is kept in the steps after the first: there must be some.
    body = {"model": str(host.rig.model), "max_tokens": 16, "temperature": 0, **ways, **salt}

    def ask() -> None:
        reply = post(f"{host.engine.url}/v1/{path}", body, deadline_s=120)
        assert reply.status == 200, reply.text
        assert unleased(host.tool, deadline_s=30)

    with LocalKv.open(host.rig.settings_of(host.daemon)) as kv:

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


def assert_same(reply: Reply, other: Reply) -> None:
    """The same tokens, of the same probabilities: the same KV went into both."""
    assert reply.text == other.text
    assert reply.logprobs == other.logprobs
    assert reply.logprobs["top_logprobs"]


def cached_tokens(reply: Reply) -> int:
    """Of the prompt: what was computed before, here or elsewhere."""
    return int((reply.usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)
