"""A real model on a prefill and a decode vLLM engine, each with a daemon of its own, behind a router.

Everything is started once. The tests stand in an order that needs no restart: the last one kills the prefill engine.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hosts
import pytest

from benchmarks.harness.rig import (
    PATIENT,
    START_S,
    Part,
    Reply,
    Rig,
    counter,
    post_stream,
    rig_in,
    stats,
    unleased,
    wait_until,
)
from pdx.client import DaemonClient
from pdx.launch import processes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]  # the first test waits for the engines' start, some 35 s

LAYERS, BLOCK_TOKENS, CHUNK_TOKENS = 30, 128, 256
# Bounds of hangs, no claims of speed: on a machine whose cores others had taken, one step has needed 20 s. With these
# no handoff ends because it is slow, so that a request which did not come through the pair shows a defect.
DEADLINE_S = 500.0
QUESTIONS = (
    "The capital of France is", "The largest planet of the solar system is", "Water is made of hydrogen and",
    "The opposite of hot is",
)  # fmt: skip
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# What `vllm bench serve` runs. (vLLM's command does not start where its package is the one for CPUs.)
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
YIELDING = ("nice", "-n", "5")  # vLLM's processes spin for a second after each step: other tests run beside them
CHANGING = ("id", "created", "system_fingerprint")  # of a stream's events: different in any two answers


@dataclass(frozen=True)
class System:
    """What is running, and what the daemons count."""

    rig: Rig
    prefill: Part
    decode: Part
    source: DaemonClient
    target: DaemonClient

    def counters(self) -> Counter[str]:
        return Counter(stats(self.target)["counters"])

    @property
    def prefill_alone(self) -> hosts.Host:
        return hosts.Host(self.rig, self.prefill, "a", self.source)

    def free(self) -> bool:
        return unleased(self.source, self.target, deadline_s=DEADLINE_S)

    def complete(self, prompt: str | list[int], *, url: str = "", max_tokens: int = 8) -> Reply:
        return self.rig.complete(prompt, url=url, max_tokens=max_tokens, deadline_s=DEADLINE_S)


@pytest.fixture(scope="module")
def system(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with rig_in(model, tmp_path_factory.mktemp("rig")) as rig:
        rig.start_router(*PATIENT)
        for name in "ab":
            rig.start_daemon(
                name, arena="512MiB", digest_mode="true", poison="true", linger_s=str(START_S), lease_s=str(DEADLINE_S)
            )
        prefill = rig.start_engine(
            "P0", "prefill", "a", cpu=0, flags=("--max-num-batched-tokens", str(CHUNK_TOKENS), *hosts.FLAGS),
            environment=hosts.ENVIRONMENT, lookup_s=str(DEADLINE_S), prefix=YIELDING,
        )  # fmt: skip
        decode = rig.start_engine("D0", "decode", "b", cpu=1, prefix=YIELDING)
        sessions = {part.process.pid for part in rig.parts}
        rig.wait_routable(2)
        system = System(rig, prefill, decode, rig.tool("a"), rig.tool("b"))
        assert system.free()  # and the tools' connections, which ZeroMQ makes in the background, are there
        yield system
    assert processes.of_sessions(sessions) == []


@pytest.fixture(autouse=True)
def nothing_wrong(system: System) -> Iterator[None]:
    """No test leaves a lease, and none ever finds a wrong page."""
    yield
    assert system.free()
    assert system.counters()["commit_mismatches"] == 0


def tokens_of(count: int, *, seed: int) -> list[int]:
    return [(seed * 7919 + n * 104_729) % 40_000 + 100 for n in range(count)]


def assert_through_the_pair(*replies: Reply) -> None:
    """Else says why not."""
    names = ("x-pdx-prefill", "x-pdx-decode", "x-pdx-reason")
    ways = [(reply.status, *(reply.headers.get(name, "") for name in names)) for reply in replies]
    assert ways == [(200, "P0", "D0", "")] * len(replies)


def test_a_completion_is_right(system: System) -> None:
    reply = system.complete(QUESTIONS[0])
    assert_through_the_pair(reply)
    assert "Paris" in reply.text
    assert system.counters()["loads_ok"] == 1


def test_a_streamed_chat_answer_is_right(system: System) -> None:
    reply, events = chat(system, system.rig.url)
    assert_through_the_pair(reply)
    assert "Paris" in reply.text
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize("ask", ["completion", "chat"])
@pytest.mark.parametrize(
    "more", [{}, {"max_tokens": 1}, {"max_tokens": 2}, {"stop": ["."]}, {"logit_bias": {"2": 100}}]
)
def test_a_seeded_stream_is_the_one_that_the_engine_alone_sends(system: System, ask: str, more: dict[str, Any]) -> None:
    """Prefill's first token, decode's others; token 2 is the model's end of text."""
    streamed = chat if ask == "chat" else completion
    reply, through_pair = streamed(system, system.rig.url, **more)
    _, alone = streamed(system, system.decode.url, **more)
    assert reply.headers["x-pdx-way"] == "seeded"
    if "stop" in more:  # what is held back meanwhile is cut into other events
        assert told(through_pair) == told(alone)
    else:
        assert [plain(event) for event in through_pair] == [plain(event) for event in alone]


def test_a_paired_stream_is_the_one_that_the_engine_alone_sends(system: System) -> None:
    before = system.counters()
    reply, through_pair = chat(system, system.rig.url, presence_penalty=0.5)
    _, alone = chat(system, system.decode.url, presence_penalty=0.5)
    assert (reply.headers["x-pdx-way"], reply.headers["x-pdx-unseeded"]) == ("paired", "penalty")
    assert [plain(event) for event in through_pair] == [plain(event) for event in alone]
    assert (system.counters() - before)["loads_ok"] == 1


def test_the_openai_client(system: System) -> None:
    openai = pytest.importorskip("openai", reason="the client is not installed: pip install 'pdx-kv[dev]'")
    model, before = str(system.rig.model), system.counters()
    ask = {"model": model, "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    answers = []
    for url in (system.rig.url, system.decode.url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
            whole = client.chat.completions.create(**ask)
            pieces = list(client.chat.completions.create(**ask, stream=True))
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
            response = client.responses.create(
                model=model, input=QUESTION[0]["content"], max_output_tokens=16, temperature=0
            )
            assert text == whole.choices[0].message.content
            assert [model] == [each.id for each in client.models.list()]
            answers.append((text, whole.usage.prompt_tokens, whole.usage.completion_tokens, response.output_text))
    assert answers[0] == answers[1]
    assert (system.counters() - before)["loads_ok"] == 2, "both chats came through the pair"


def test_the_anthropic_client(system: System) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the client is not installed: pip install 'pdx-kv[dev]'")
    before = system.counters()
    ask = {"model": str(system.rig.model), "messages": QUESTION, "max_tokens": 16, "extra_body": {"temperature": 0}}
    answers = []
    for url in (system.rig.url, system.decode.url):
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
            whole = client.messages.create(**ask)
            with client.messages.stream(**ask) as stream:
                text, usage = "".join(stream.text_stream), stream.get_final_message().usage
            assert text == whole.content[0].text
            counted = client.messages.count_tokens(model=ask["model"], messages=QUESTION).input_tokens
            answers.append((text, counted, usage.output_tokens))
    assert answers[0] == answers[1]
    assert (system.counters() - before)["loads_ok"] == 2, "both came through the pair"


@pytest.mark.prove
def test_vllm_bench_serve(system: System) -> None:
    """As its users call it, by the model that the router names first."""
    before = system.counters()
    command = [
        *(sys.executable, "-c", BENCH_SERVE, "--backend", "openai", "--base-url", system.rig.url),
        *("--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "4", "--num-prompts", "4"),
        *("--tokenizer", str(system.rig.model), "--disable-tqdm"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"Successful requests:\s+4\b", done.stdout), done.stdout
    assert re.search(r"Total generated tokens:\s+16\b", done.stdout), done.stdout
    assert (system.counters() - before)["loads_ok"] >= 4, "its warm-up too"


@pytest.mark.parametrize("count", [1, 127, 128, 129, 257, 600])
def test_pages_at_block_boundaries_are_bit_identical(system: System, count: int) -> None:
    before = system.counters()
    assert_through_the_pair(system.complete(tokens_of(count, seed=count)))
    assert system.free()
    grown = system.counters() - before
    assert (grown["loads_ok"], grown["loads_failed"]) == (1, 0)
    assert grown["pages_verified"] == grown["pages_landed"] == LAYERS * -(-count // BLOCK_TOKENS)


def test_eight_at_once(system: System) -> None:
    before = system.counters()
    prompts = [tokens_of(60 + 37 * n, seed=1000 + n) for n in range(8)]
    replies = system.rig.together([lambda p=prompt: system.complete(p, max_tokens=4) for prompt in prompts])
    assert_through_the_pair(*replies)
    assert system.free()
    grown = system.counters() - before
    assert (grown["loads_ok"], grown["loads_failed"]) == (8, 0)


def test_greedy_text_is_that_of_the_engine_alone(system: System) -> None:
    through_pair = [system.complete(question) for question in QUESTIONS]
    assert_through_the_pair(*through_pair)
    alone = [system.complete(question, url=system.decode.url) for question in QUESTIONS]
    assert [reply.text for reply in through_pair] == [reply.text for reply in alone]


def test_the_next_turn_finds_the_answer_where_its_prompt_is_computed(system: System) -> None:
    """The answer fills a block: decode's host hands it back, and prefill loads it instead of computing it."""
    before, returned = Counter(stats(system.source)["counters"]), counter(system.target, "blocks_returned")
    first = tokens_of(BLOCK_TOKENS - 28, seed=77)
    reply = system.rig.complete(
        first, max_tokens=40, deadline_s=DEADLINE_S, ignore_eos=True, logprobs=1, return_tokens_as_token_ids=True
    )
    assert_through_the_pair(reply)
    said = [int(token.removeprefix("token_id:")) for token in reply.logprobs["tokens"]]
    wait_until(lambda: counter(system.target, "blocks_returned") == returned + 1, DEADLINE_S, "the answer is back")
    second = [*first, *said, *tokens_of(30, seed=78)]
    through_pair = system.complete(second)
    assert_through_the_pair(through_pair)
    assert system.free()
    grown = Counter(stats(system.source)["counters"]) - before
    assert (grown["lookup_hit_blocks"], grown["loads_ok"], grown["loads_failed"]) == (1, 1, 0)
    assert grown["pages_verified"] == LAYERS
    assert through_pair.text == system.complete(second, url=system.decode.url).text


def test_what_left_the_engines_cache_is_loaded(system: System) -> None:
    hosts.check_that_what_left_the_engines_cache_is_loaded(system.prefill_alone)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("completions", {"text": hosts.LONG}),
        ("chat/completions", {"messages": hosts.CHAT, "cache_salt": "alice"}),
    ],
    ids=["text", "salted chat"],
)
def test_lookup_says_what_the_next_request_gets(system: System, path: str, said: dict[str, Any]) -> None:
    hosts.check_that_lookup_says_what_the_next_request_gets(system.prefill_alone, path, said)


def test_a_client_that_leaves_in_mid_prompt_frees_everything(system: System) -> None:
    before = counter(system.source, "pages_put")
    target = urlsplit(system.rig.url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=DEADLINE_S)
    body = {"model": str(system.rig.model), "prompt": tokens_of(2000, seed=2000), "max_tokens": 4}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: counter(system.source, "pages_put") > before, DEADLINE_S, "pages are sent")
    connection.close()
    assert system.free()
    assert_through_the_pair(system.complete(QUESTIONS[0]))


def test_killing_the_prefill_engine_in_mid_prompt_costs_only_time(system: System) -> None:
    # The whole prompt, and the rest behind a hit, are shapes that bf16 rounds differently. What is said for the third
    # time is continued in one way all the same: the next best token is an eighth as probable, at most.
    prompt = tokens_of(500, seed=3000) * 3
    before = counter(system.source, "pages_put")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(system.complete, prompt)
        wait_until(lambda: counter(system.source, "pages_put") > before, DEADLINE_S, "pages are sent")
        system.prefill.kill()
        system.rig.forget(system.prefill)
        reply = asked.result(DEADLINE_S)
    assert reply.status == 200
    assert system.free()
    assert reply.text == system.complete(prompt, url=system.decode.url).text


def chat(system: System, url: str, **more: Any) -> tuple[Reply, list[str]]:
    return stream(system, f"{url}/v1/chat/completions", {"messages": QUESTION, **more})


def completion(system: System, url: str, **more: Any) -> tuple[Reply, list[str]]:
    return stream(system, f"{url}/v1/completions", {"prompt": QUESTIONS[0], **more})


def stream(system: System, url: str, asked: dict[str, Any]) -> tuple[Reply, list[str]]:
    body = {
        "model": str(system.rig.model), "max_tokens": 16, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **asked,
    }  # fmt: skip
    return post_stream(url, body, deadline_s=DEADLINE_S)


def told(events: list[str]) -> tuple[str, Any]:
    """All the text, and the usage at the end."""
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
    return text + choices[-1]["finish_reason"], without_cached(chunks[-1]["usage"])


def plain(event: str) -> Any:
    """An event without what differs between any two answers."""
    if event == "[DONE]":
        return event
    chunk = {k: v for k, v in json.loads(event).items() if k not in CHANGING}
    return {**chunk, "usage": without_cached(chunk["usage"])} if chunk.get("usage") else chunk


def without_cached(usage: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in usage.items() if k != "prompt_tokens_details"}
