"""What must hold of any pair: right answers whatever dies, clean errors, nothing left. Real engines, a real model.

Each section starts what it needs, so that one can be run alone: `python -m benchmarks.skeleton identity faults`. All
take about 9 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.demo import the_document
from benchmarks.harness.part import Part
from benchmarks.harness.report import HISTORY, Report
from benchmarks.harness.rig import (
    REPOSITORY,
    Reply,
    Rig,
    counter,
    get,
    leases,
    post,
    rig_in,
    stats,
    unleased,
    wait_until,
)
from benchmarks.model import build
from pdx.buffer.arena import Arena
from pdx.client import DaemonClient
from pdx.errors import PdxError
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.layout import CONTROL_BYTES, PageLayout
from pdx.wire import Attach, EngineInfo

LAYERS, BLOCK_TOKENS = 30, 128
# Block boundaries and one either side, several prompt chunks of 256, a repeated prefix at the end.
PROMPT_LENGTHS = (1, 2, 127, 128, 129, 255, 256, 257, 384, 511, 513, 600)
CHUNK = ("--max-num-batched-tokens", "256")
REQUEST_DEADLINE_S = 90.0


def tokens_of(count: int, seed: int) -> list[int]:
    """`count` token ids that look like text to the model: a slice of a long text would do, ids spread are harder."""
    return [(seed * 7919 + n * 104_729) % 40_000 + 100 for n in range(count)]


# --- identity -------------------------------------------------------------------------------------------------


def prove_identity(rig: Rig, report: Report) -> None:
    """Digest mode over tcp: every page that decode loaded is the page that prefill computed."""
    rig.start_router()
    for name in "ab":
        rig.start_daemon(name, arena="768MiB", digest_mode="true", poison="true")
    rig.start_engine("P0", "prefill", "a", cpu=0, flags=CHUNK)
    decode = rig.start_engine("D0", "decode", "b", cpu=1, environment={"VLLM_SERVER_DEV_MODE": "1"})
    rig.wait_routable(2)
    source, target = rig.tool("a"), rig.tool("b")

    def run(label: str, prompts: list[list[int]], *, at_once: bool) -> None:
        before = stats(target)["counters"]
        calls = [partial(rig.complete, prompt, deadline_s=REQUEST_DEADLINE_S) for prompt in prompts]
        replies = rig.together(calls) if at_once else [call() for call in calls]
        report.equal(f"{label}: answered", [reply.status for reply in replies], [200] * len(prompts))
        report.equal(f"{label}: handed over", sum("x-pdx-prefill" in r.headers for r in replies), len(prompts))
        report.equal(f"{label}: all leases end", unleased(source, target), True)
        after = stats(target)["counters"]
        grown = {name: after.get(name, 0) - before.get(name, 0) for name in after}
        report.equal(f"{label}: loads verified by digest", grown.get("loads_ok", 0), len(prompts))
        report.equal(f"{label}: loads failed", grown.get("loads_failed", 0), 0)
        report.bar(f"{label}: pages bit-identical", grown.get("pages_verified", 0),
                   f">= {grown.get('pages_landed', 0)} landed",
                   grown.get("pages_verified", 0) >= grown.get("pages_landed", 0) > 0)  # fmt: skip

    run("12 prompts", [tokens_of(count, seed) for seed, count in enumerate(PROMPT_LENGTHS)], at_once=False)
    repeated = [tokens_of(512, 10)[:512] + tokens_of(50, 90 + n) for n in range(3)]
    run("repeated prefixes", repeated, at_once=False)
    run("3,500 tokens", [tokens_of(3500, 50)], at_once=False)
    run("8 at once", [tokens_of(200 + 37 * n, 60 + n) for n in range(8)], at_once=True)

    # The control: with pages that are not the same bits, the bars above must fall, and the answer must not change.
    prompt = tokens_of(600, 99)
    clean = rig.complete(prompt)
    failed = counter(target, "loads_failed")
    post(f"{decode.url}/reset_prefix_cache", {}, deadline_s=10)  # or decode would not need to load at all
    flip_every_page(rig, "b")
    spoilt = rig.complete(prompt)
    report.equal("control, one flipped byte a page: load refused", counter(target, "loads_failed") - failed, 1)
    report.equal("control, one flipped byte a page: same answer by recompute", spoilt.text, clean.text)


EXTENT_BYTES, HEADERS_BYTES = 64 << 20, 64 << 10  # more than the headers of an extent's 22 blocks


def flip_every_page(rig: Rig, daemon: str, *, extent_bytes: int = EXTENT_BYTES) -> None:
    """A bit in every 32 KiB of a daemon's arena, but not in the headers: pages are larger than that."""
    with intruder(rig, daemon) as arena:
        for extent in range(CONTROL_BYTES, arena.bytes_total, extent_bytes):
            for offset in range(extent + HEADERS_BYTES, min(extent + extent_bytes, arena.bytes_total), 32 << 10):
                arena.memory[offset] ^= 1


@contextlib.contextmanager
def intruder(rig: Rig, daemon: str) -> Iterator[Arena]:
    """The arena of a daemon, as any process of this user could map it."""
    content = ContentFingerprint(model="-", weights="-", weight_epoch="", dtype="-", block_tokens=1, hash_algorithm="-")
    layout = LayoutFingerprint(engine="-", attention="-", layers=1, page_bytes=1, block_tokens=1, packing="-",
                               kv_groups=1, ranks=1, chunk_blocks=1)  # fmt: skip
    info = EngineInfo(engine_id="intruder", role="decode", model="-", content=content, layout=layout)
    hello = Attach(kind="worker", engine=info, pages=PageLayout(layers=1, page_bytes=1, chunk_blocks=1))
    with DaemonClient.attach(rig.settings_of(daemon), hello, start=False) as client:
        assert client.arena is not None
        yield client.arena


# --- fleets ---------------------------------------------------------------------------------------------------

QUESTIONS = (
    "The capital of France is", "The capital of Italy is", "The largest planet of the solar system is",
    "Water is made of hydrogen and", "The opposite of hot is", "Two plus two equals", "The first month of the year is",
    "The color of the sky is",
)  # fmt: skip


def prove_fleets(rig: Rig, report: Report) -> None:
    """2 + 1 and 1 + 2 engines under 16 requests at once; who joins is used, who leaves is not."""
    rig.start_router()
    for name in "ab":
        rig.start_daemon(name, arena="512MiB")
    first = rig.start_engine("P0", "prefill", "a", cpu=0, flags=CHUNK)
    decode = rig.start_engine("D0", "decode", "b", cpu=1)
    rig.wait_routable(2)
    prompts = [f"{the_document(seed)[: 900 + 150 * seed]}\n{question}" for seed, question in enumerate(QUESTIONS)]
    reference = {prompt: rig.complete(prompt, url=decode.url).text for prompt in prompts}

    def run(label: str, prefills: set[str], decodes: set[str]) -> None:
        replies = rig.together([partial(rig.complete, prompt) for prompt in prompts * 2])
        report.equal(f"{label}: answered", [reply.status for reply in replies], [200] * 16)
        right = sum(reply.text == reference[prompt] for reply, prompt in zip(replies, prompts * 2, strict=True))
        # Greedy bf16 decoding may fork at a near tie when the batch differs; the pages are proven by `identity`.
        report.bar(f"{label}: same text as one engine alone", right, ">= 15 of 16", right >= 15)
        used = {reply.headers.get("x-pdx-prefill") or reply.headers.get("x-pdx-reason", "") for reply in replies}
        report.equal(f"{label}: prefill engines used", sorted(used), sorted(prefills))
        used = {reply.headers.get("x-pdx-decode", "") for reply in replies}
        report.equal(f"{label}: decode engines used", sorted(used), sorted(decodes))

    rig.start_engine("P1", "prefill", "a", cpu=0, flags=CHUNK)
    rig.wait_routable(3)
    run("2 prefill + 1 decode (P1 joined later)", {"P0", "P1"}, {"D0"})
    first.stop()
    rig.forget(first)
    wait_until(lambda: get(f"{rig.url}/readyz?engines=3") != 200, 10, "the router notices that P0 left")
    rig.start_engine("D1", "decode", "b", cpu=1)
    rig.wait_routable(3)
    run("1 prefill + 2 decode (P0 left, D1 joined)", {"P1"}, {"D0", "D1"})
    report.equal("all leases end", unleased(rig.tool("a"), rig.tool("b")), True)


# --- faults ---------------------------------------------------------------------------------------------------


DAEMON: dict[str, Any] = {"arena": "512MiB", "poison": "true", "digest_mode": "true", "lease_s": "4", "linger_s": "600"}


class _Asked:
    """A request under way in a thread of its own."""

    def __init__(self, prompt: str, pages_put_before: int) -> None:
        self.prompt = prompt
        self.pages_put_before = pages_put_before
        self.thread: threading.Thread | None = None
        self._reply = Reply(0, "no answer within the deadline", REQUEST_DEADLINE_S)

    def take(self, complete: Callable[..., Reply]) -> None:
        self._reply = complete(self.prompt, deadline_s=REQUEST_DEADLINE_S)

    def reply(self) -> Reply:
        assert self.thread is not None
        self.thread.join(REQUEST_DEADLINE_S + 5)
        return self._reply


class Faults:
    """One fault after another on a running pair; whatever was killed is started again."""

    def __init__(self, rig: Rig, report: Report) -> None:
        self.rig, self.report = rig, report
        self.router = rig.start_router()
        # No daemon is started here: each engine finds none and starts its host's, now and after every kill.
        self.prefill, self.decode = self._prefill(), self._decode()
        rig.wait_routable(2)
        self.tools: dict[str, DaemonClient] = {name: rig.tool(name) for name in "ab"}
        self._seed = 100

    def run(self) -> None:
        self.kill_prefill()
        self.stop_prefill()
        self.kill_daemon("a")
        self.kill_daemon("b")
        self.kill_decode()
        self.kill_router()

    def kill_prefill(self) -> None:
        asked = self._ask_in_background()
        self._pushing(asked)
        self._kill(self.prefill)
        self._right_or_clean("kill -9 of the prefill engine in mid-prompt", asked, must_answer=True)
        self.prefill = self._prefill()
        self.rig.wait_routable(2)

    def stop_prefill(self) -> None:
        asked = self._ask_in_background()
        self._pushing(asked)
        self.prefill.signal(signal.SIGSTOP)
        self._right_or_clean("SIGSTOP of the prefill engine past every budget", asked, must_answer=True, quiet="")
        held = stats(self.tools["a"])["store"]["slots"]["quarantine"]
        self.report.bar("SIGSTOP: its slots stay in quarantine while it could still write", held, "> 0", held > 0)
        others = self.rig.complete(self._prompt(), url=self.decode.url)
        self.report.equal("SIGSTOP: the decode engine serves on meanwhile", others.status, 200)
        self.prefill.signal(signal.SIGCONT)
        self._serves_on("SIGCONT")

    def kill_daemon(self, name: str) -> None:
        asked = self._ask_in_background()
        self._pushing(asked)
        self.rig.kill_daemon(name)
        side = "prefill's" if name == "a" else "decode's"
        survivor = "b" if name == "a" else "a"
        self._right_or_clean(f"kill -9 of {side} daemon in mid-prompt", asked, must_answer=True, quiet=survivor)
        # The engine has started another one by itself.
        self.tools[name] = self.rig.tool(name)
        wait_until(lambda: stats(self.tools[name])["engines"], 60, "the engine attaches again")
        self._serves_on(f"{side} daemon back")

    def kill_decode(self) -> None:
        asked = self._ask_in_background()
        loading = "engine loading"
        wait_until(lambda: any(loading in half for half in stats(self.tools["b"])["handoffs"]), 60, "decode loads")
        self._kill(self.decode)
        self._right_or_clean("kill -9 of the decode engine while it loads", asked, must_answer=False)
        self.decode = self._decode()
        self.rig.wait_routable(2)
        self._serves_on("decode engine back")

    def kill_router(self) -> None:
        asked = self._ask_in_background()
        self._pushing(asked)
        self._kill(self.router)
        killed = time.monotonic()
        free = unleased(*self.tools.values(), deadline_s=5.0)
        self.report.bar("router killed: everything free within", round(time.monotonic() - killed, 2), "<= 5",
                        free, unit="s")  # fmt: skip
        self.report.equal("router killed: the connection breaks", asked.reply().status, 0)
        self.router = self.rig.start_router()
        self.rig.wait_routable(2)
        self._serves_on("router back")

    # --- steps ---

    def _prefill(self) -> Part:
        return self.rig.start_engine("P0", "prefill", "a", cpu=0, flags=CHUNK, **DAEMON)

    def _decode(self) -> Part:
        return self.rig.start_engine("D0", "decode", "b", cpu=1, **DAEMON)

    def _prompt(self) -> str:
        """Some 1,500 tokens that nobody has seen, with an answer that the model is sure of."""
        self._seed += 1
        return f"{the_document(self._seed)}\nQuestion: What is the capital of France?\nAnswer:"

    def _ask_in_background(self) -> _Asked:
        asked = _Asked(self._prompt(), counter(self.tools["a"], "pages_put"))
        asked.thread = threading.Thread(target=lambda: asked.take(self.rig.complete), daemon=True)
        asked.thread.start()
        return asked

    def _pushing(self, asked: _Asked) -> None:
        wait_until(lambda: counter(self.tools["a"], "pages_put") > asked.pages_put_before, 60, "pages are on the wire")

    def _kill(self, part: Part) -> None:
        part.kill()
        self.rig.forget(part)

    def _right_or_clean(self, what: str, asked: _Asked, *, must_answer: bool, quiet: str = "ab") -> None:
        reply = asked.reply()
        ok = reply.status == 200 if must_answer else reply.status in (200, 502, 503, 504)
        target = "200" if must_answer else "200 or a clean error"
        self.report.bar(f"{what}: answer", f"{reply.status} after {reply.seconds:.1f} s", target, ok)
        if reply.status == 200:
            alone = self.rig.complete(asked.prompt, url=self.decode.url)
            self.report.equal(f"{what}: the text of the decode engine alone", reply.text, alone.text)
        if quiet:
            tools = [self.tools[name] for name in quiet]
            self.report.equal(f"{what}: slots return", unleased(*tools), True)

    def _serves_on(self, what: str) -> None:
        def served() -> bool:
            return "x-pdx-prefill" in self.rig.complete(self._prompt()).headers

        with contextlib.suppress(TimeoutError):
            wait_until(served, 60, "a pair serves again")
        self.report.equal(f"{what}: a pair serves on", served(), True)
        self.report.equal(f"{what}: all leases end", unleased(*self.tools.values(), deadline_s=20), True)


# --- bad input ------------------------------------------------------------------------------------------------


def prove_bad_input(rig: Rig, report: Report) -> None:
    """One clear line and the right status; nothing dies."""
    rig.start_router()
    rig.start_daemon("a", arena="48MiB")
    rig.start_engine("P0", "prefill", "a", cpu=0, flags=CHUNK)
    rig.start_engine("D0", "decode", "a", cpu=1)
    rig.wait_routable(2)
    completions = f"{rig.url}/v1/completions"

    def status(name: str, body: dict | bytes, target: int) -> None:
        reply = post(completions, body, deadline_s=60)
        said = reply.text.replace(str(rig.model), "MODEL")
        report.bar(name, f"{reply.status} {said[:90]!r}", str(target), reply.status == target)

    status("unknown model", {"model": "nobody", "prompt": "x"}, 404)
    status("broken JSON", b'{"model": ', 400)
    status("a list where an object belongs", b"[1, 2]", 400)
    status("prompt longer than the context", {"model": str(rig.model), "prompt": tokens_of(5000, 1)}, 400)
    too_large = {"model": str(rig.model), "prompt": tokens_of(3000, 2), "max_tokens": 2}
    status("prompt larger than the arena", too_large, 200)
    status("client-sent kv_transfer_params", {
        "model": str(rig.model), "prompt": "x", "max_tokens": 1,
        "kv_transfer_params": {"do_remote_prefill": True, "pdx_handle": "forged"}}, 200)  # fmt: skip
    port = rig.url.rsplit(":", 1)[1]
    for name, command in {
        "unknown flag": ["-m", "pdx.router.main", "--no-such-flag"],
        "taken port": ["-m", "pdx.router.main", "--port", port, "--control", "tcp://127.0.0.1:0"],
        "arena larger than memory": ["-m", "pdx.daemon.main", "--arena", "900TiB", "--run-dir", tempfile.mkdtemp()],
        "not a size": ["-m", "pdx.daemon.main", "--arena", "much"],
        "off loopback without a key": ["-m", "pdx.daemon.main", "--host", "10.1.2.3"],
    }.items():
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
        line = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        clean = done.returncode == 2 and "Traceback" not in done.stderr
        report.bar(name, f"exit {done.returncode}: {line[:110]}", "exit 2, one clear line", clean)
    environment = {**os.environ, "PDX_AREAN": "1GiB"}
    done = subprocess.run([sys.executable, "-m", "pdx.daemon.main"], capture_output=True, text=True, env=environment,
                          timeout=60, cwd=REPOSITORY)  # fmt: skip
    report.bar("unknown config key", done.stderr.strip().splitlines()[-1][:110], "did you mean 'arena'",
               done.returncode == 2 and "did you mean 'arena'" in done.stderr)  # fmt: skip
    with intruder(rig, "a") as arena:
        try:
            os.ftruncate(arena.fd, 0)
            outcome = "it shrank"
        except PermissionError as error:
            outcome = str(error)
        report.bar("a client's ftruncate on the arena", outcome, "not permitted", "not permitted" in outcome.lower())
    reply = rig.complete("The capital of France is")
    report.bar("after all of it: still right", reply.text.strip()[:20], "Paris", reply.text.strip().startswith("Paris"))
    report.equal("after all of it: leases", leases(rig.tool("a")), 0)


def prove_faults(rig: Rig, report: Report) -> None:
    """kill -9 and SIGSTOP of every part in mid-handoff."""
    Faults(rig, report).run()


def prove_demo(rig: Rig, report: Report) -> None:
    """The demo, once more on a machine that is set up."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.demo", "--model", str(rig.model)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    seconds = round(time.monotonic() - started, 1)
    report.equal("demo: exit status", done.returncode, 0)
    report.bar("demo: seconds", seconds, "<= 90", seconds <= 90, unit="s")
    report.figures["demo"] = [line.replace(str(REPOSITORY), ".") for line in done.stdout.splitlines()]


SECTIONS = {
    "identity": prove_identity, "fleets": prove_fleets, "faults": prove_faults, "bad-input": prove_bad_input,
    "demo": prove_demo,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench skeleton", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's)")
    parser.add_argument("--json", type=Path, help=f"where to write (default: a new file in {HISTORY.name}/)")
    options = parser.parse_args(argv)
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    model = options.model or build()
    report = Report("skeleton")
    scratch = Path(tempfile.mkdtemp(prefix="pdx-skeleton-"))
    for name in options.sections or SECTIONS:
        print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
        try:
            with rig_in(model, scratch / name) as rig:
                SECTIONS[name](rig, report)
        except (TimeoutError, PdxError, SystemExit) as error:
            report.bar(f"{name}: ran to its end", str(error), "yes", False)
    report.write(options.json)
    if report.all_hold:
        shutil.rmtree(scratch)
    else:
        print(f"logs are kept in {scratch}")
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
