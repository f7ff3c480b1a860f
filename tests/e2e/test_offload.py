"""A real vLLM engine by itself, with a disk: what left its cache comes back from the arena, and from the disk after a
restart. The same checks run in `make test` on the pair's prefill engine, which is there anyway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import (
    BLOCK_TOKENS,
    CHAT,
    DEADLINE_S,
    ENVIRONMENT,
    FLAGS,
    LASTING,
    LAYERS,
    LONG,
    PROMPT_TOKENS,
    WHOLE,
    Host,
    assert_same,
    check_that_lookup_says_what_the_next_request_gets,
    check_that_what_left_the_engines_cache_is_loaded,
)
from safetensors.torch import load_file, save_file

from benchmarks.harness.measure import prompt_of
from benchmarks.harness.rig import START_S, counter, rig_in, stats, unleased, wait_until
from pdx.client import DaemonClient
from pdx.launch import processes
from pdx.wire import Attach

pytestmark = [pytest.mark.vllm, pytest.mark.prove, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def host(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The engine starts its daemon itself, the second one too."""
    with rig_in(model, tmp_path_factory.mktemp("rig")) as rig:
        rig.start_router()
        engine = rig.start_engine(
            "E0", "both", "a", cpu="0-1", environment=ENVIRONMENT, flags=FLAGS,
            arena="512MiB", digest_mode="true", poison="true", linger_s=str(START_S),
            disk=str(tmp_path_factory.mktemp("disk")), disk_cap="1GiB", **LASTING,
        )  # fmt: skip
        sessions = {part.process.pid for part in rig.parts}
        rig.wait_routable(1)
        host = Host(rig, engine, "a", rig.tool("a"))
        # And its connection, which ZeroMQ makes in the background, is there.
        assert unleased(host.tool, deadline_s=DEADLINE_S)
        yield host
    assert processes.of_sessions(sessions) == []


def test_a_prompt_that_left_the_engines_cache_is_loaded(host: Host) -> None:
    check_that_what_left_the_engines_cache_is_loaded(host)


def test_what_was_generated_is_kept(host: Host) -> None:
    before = host.counters()
    host.ask(prompt_of(BLOCK_TOKENS + 20, 2), max_tokens=BLOCK_TOKENS)  # the second block becomes whole on the way
    assert unleased(host.tool, deadline_s=DEADLINE_S)
    assert host.grown(before, "blocks_kept") == 2


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("completions", {"text": LONG}),
        ("completions", {"tokens": prompt_of(PROMPT_TOKENS, 4)}),
        pytest.param("completions", {"text": "A tenant's. " + LONG, "cache_salt": "alice"}),
        pytest.param("chat/completions", {"messages": CHAT}),
        ("chat/completions", {"messages": CHAT, "cache_salt": "alice"}),
    ],
    ids=["text", "tokens", "salted", "chat", "salted chat"],
)
def test_lookup_says_what_the_next_request_gets(host: Host, path: str, said: dict[str, Any]) -> None:
    check_that_lookup_says_what_the_next_request_gets(host, path, said)


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
