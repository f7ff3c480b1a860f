"""The demo: a real model answers through a prefill and a decode engine on two daemons, KV pushed while it is computed.

`make demo` runs it. It starts `pdx up` as a user would, asks three questions, shows for each what was computed and
sent when, kills the prefill engine in the middle of a fourth prompt, and ends everything it started.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import timeline
from benchmarks.model import build, dtype_flags
from pdx import config
from pdx.client import DaemonClient
from pdx.launch import guard, processes
from pdx.wire import Ask, Attach

REPOSITORY = Path(__file__).resolve().parent.parent
CHUNK_TOKENS = 512  # prompt-chunk budget: a 1,500-token prompt is prefilled in three steps
START_ETA_S = 60
ENGINE_FLAGS = (
    "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "8", "--max-num-batched-tokens", str(CHUNK_TOKENS),
)  # fmt: skip
STAGES = 6
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Reply:
    """One streamed answer, with what the client saw. Times: monotonic ns and seconds."""

    text: str
    sent_ns: int
    token_ns: tuple[int, ...]
    headers: dict[str, str]

    @property
    def ttft_ms(self) -> float:
        return (self.token_ns[0] - self.sent_ns) / 1e6

    @property
    def itl_ms(self) -> float:
        gaps = sorted(b - a for a, b in zip(self.token_ns, self.token_ns[1:], strict=False))
        return gaps[len(gaps) // 2] / 1e6 if gaps else 0.0


class Host:
    """One of the demo's two daemons, asked over its own socket."""

    def __init__(self, run_dir: str) -> None:
        settings = config.load({"run_dir": run_dir}, environ={})
        self._client = DaemonClient.attach(settings, Attach(kind="tool"), start=False, deadline_s=5)

    def stats(self) -> dict[str, Any]:
        return self._client.ask(Ask(verb="stats")).body

    def counter(self, name: str) -> int:
        return int(self.stats()["counters"].get(name, 0))

    def events(self, handoff_id: bytes) -> list[timeline.Event]:
        return list(self._client.ask(Ask(verb="trace", handoff_id=handoff_id)).body["events"])

    def close(self) -> None:
        self._client.close()


class Demo:
    """The stages, in order."""

    def __init__(self, model: Path, output: Path) -> None:
        self._model = model
        self._output = output
        self._stage = 0
        self._begun = time.monotonic()
        self._shared_before = set(os.listdir("/dev/shm"))
        self._arenas_before = mapped_arenas()
        self._traces: list[tuple[str, list[timeline.Event]]] = []

    def run(self) -> int:
        with tempfile.TemporaryDirectory(prefix="pdx-demo-") as scratch:
            fleet = Path(scratch) / "fleet.json"
            self._say("starting a router, two daemons and two engines", eta_s=START_ETA_S)
            launcher = self._start(fleet)
            try:
                self._wait_ready(launcher, fleet)
                ok = self._show(json.loads(fleet.read_text(encoding="utf-8")))
            finally:
                ended = self._stop(launcher)
        return 0 if ok and ended else 1

    # --- stages -----------------------------------------------------------------------------------------------

    def _show(self, fleet: dict[str, Any]) -> bool:
        prefill_host, decode_host = (Host(run_dir) for run_dir in fleet["run_dirs"])
        try:
            document = the_document()
            first = [{"role": "user", "content": f"{document}\n\nIn one sentence: what is this document about?"}]
            self._say("a short question")
            self._ask(fleet, "short question", [{"role": "user", "content": "What is the capital of France?"}],
                      prefill_host, decode_host)  # fmt: skip
            self._say("a question about a document of some 1,500 tokens")
            answer = self._ask(fleet, "document", first, prefill_host, decode_host)
            follow_up = [
                *first,
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": "Who keeps this record, and where?"},
            ]
            self._say("a follow-up on the same document: only what is new is computed and sent")
            self._ask(fleet, "follow-up", follow_up, prefill_host, decode_host)
            self._write_pictures()
            self._say("the prefill engine is killed in the middle of a prompt")
            return self._kill_prefill(fleet, prefill_host, decode_host)
        finally:
            prefill_host.close()
            decode_host.close()

    def _ask(
        self, fleet: dict[str, Any], name: str, messages: list[dict[str, str]], prefill_host: Host, decode_host: Host
    ) -> Reply:
        sent_before, checked_before = prefill_host.stats()["counters"], decode_host.counter("pages_verified")
        print(f"  Q: {messages[-1]['content'][-100:].splitlines()[-1]}\n  A: ", end="", flush=True)
        reply = stream(fleet["url"], self._model, messages, show=True)
        print()
        handoff = bytes.fromhex(reply.headers.get("x-pdx-handoff", "").replace("none", ""))
        wait_for(lambda: decode_host.counter("pages_verified") > checked_before, 2.0)
        events = prefill_host.events(handoff) + decode_host.events(handoff)
        self._traces.append((name, events))
        sent = prefill_host.stats()["counters"]
        pages = sent.get("pages_put", 0) - sent_before.get("pages_put", 0)
        megabytes = (sent.get("bytes_put", 0) - sent_before.get("bytes_put", 0)) / 1e6
        verified = decode_host.counter("pages_verified") - checked_before
        print(f"     {pages} pages, {megabytes:.1f} MB sent; {verified} pages verified by the decode engine")
        view = timeline.read_events(events)
        if view is None:
            print(f"     no handoff: {reply.headers.get('x-pdx-reason', 'prefix cached on both sides')}")
        else:
            self._explain(reply, view)
        return reply

    def _explain(self, reply: Reply, view: timeline.Timeline) -> None:
        for line in timeline.terminal_bars(view, columns=60):
            print(f"     {line}")
        prefill_ms = (view.computed_ns - reply.sent_ns) / 1e6
        exposed_ms = view.exposed_ns / 1e6
        print(
            f"     TTFT {reply.ttft_ms:.0f} ms = prefill {prefill_ms:.0f} + exposed transfer {exposed_ms:.1f} + "
            f"hand-over and decode step {reply.ttft_ms - prefill_ms - exposed_ms:.0f}; ITL {reply.itl_ms:.0f} ms\n"
            f"     {view.hidden_fraction:.1%} of the pages were there before prefill ended; "
            f"lane {view.lane} (two daemons, so not shared memory)"
        )

    def _kill_prefill(self, fleet: dict[str, Any], prefill_host: Host, decode_host: Host) -> bool:
        victim = next(engine for engine in fleet["engines"] if engine["role"] == "prefill")
        before = prefill_host.counter("pages_put")
        content = f"Read this log backwards.\n{the_document(seed=7)}\n\nIn one sentence: what is this document about?"
        messages = [{"role": "user", "content": content}]
        print("  A: ", end="", flush=True)
        asking = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.demo", "--ask", fleet["url"], "--model", str(self._model)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True,
        )  # fmt: skip
        assert asking.stdin is not None
        asking.stdin.write(json.dumps(messages))
        asking.stdin.close()
        asking.stdin = None
        wait_for(lambda: prefill_host.counter("pages_put") > before, 60.0)
        pids = [pid for pid in processes.of_sessions({victim["session"]}) if pid != victim["session"]]
        processes.kill(pids)
        print(f"[killed {len(pids)} processes of {victim['name']} with pages on the wire] ", end="", flush=True)
        got, _ = asking.communicate(timeout=120)
        answer = json.loads(got or "{}").get("text", "")
        print(answer)
        reference = stream(next(e for e in fleet["engines"] if e["role"] == "decode")["url"], self._model, messages)
        wait_for(lambda: leases(prefill_host) + leases(decode_host) == 0, 5.0)
        left = leases(prefill_host) + leases(decode_host)
        right = bool(answer) and answer == reference.text
        print(f"     recomputed by the decode engine: {'the same' if right else 'NOT THE SAME'} answer as without pdx; "
              f"{left} leases left")  # fmt: skip
        return right and left == 0

    # --- the fleet --------------------------------------------------------------------------------------------

    def _start(self, fleet: Path) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "pdx.cli", "up", str(self._model), "--hosts", "2", "--port", "0"),
            *("--arena", "512MiB", "--publish", str(fleet), *ENGINE_FLAGS, *dtype_flags()),
        ]
        ends_with_us = partial(guard.die_with_parent, signal.SIGTERM)
        return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, preexec_fn=ends_with_us)

    def _wait_ready(self, launcher: subprocess.Popen[bytes], fleet: Path) -> None:
        started = time.monotonic()
        while not fleet.exists():
            if launcher.poll() is not None:
                raise SystemExit("the fleet did not start; its lines above say why")
            elapsed = time.monotonic() - started
            if sys.stdout.isatty():
                left = max(0.0, START_ETA_S - elapsed)
                print(f"\r  {elapsed:3.0f} s, about {left:.0f} s to go ", end="", flush=True)
            wait_for(lambda: fleet.exists() or launcher.poll() is not None, 1.0)
        print(f"\r  ready after {time.monotonic() - started:.0f} s      ")

    def _stop(self, launcher: subprocess.Popen[bytes]) -> bool:
        self._say("stopping everything")
        # Each command of the launcher has a session of its own.
        commands = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        sessions = {launcher.pid, *(map(int, commands.read_text().split()) if commands.exists() else ())}
        launcher.send_signal(signal.SIGINT)
        try:
            launcher.wait(60)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()
        left, arenas = processes.of_sessions(sessions), max(0, mapped_arenas() - self._arenas_before)
        files = set(os.listdir("/dev/shm")) - self._shared_before
        print(f"  {len(left)} processes left; {arenas} arenas and {len(files)} files left in shared memory; "
              f"{time.monotonic() - self._begun:.0f} s in all")  # fmt: skip
        return not left and not arenas and not files

    def _write_pictures(self) -> None:
        self._output.mkdir(parents=True, exist_ok=True)
        view = timeline.read_events(dict(self._traces)["document"])
        if view is not None:
            picture = self._output / "overlap.svg"
            picture.write_text(timeline.svg(view, title="A 1,500-token prompt: computing and sending at once"))
            (self._output / "trace.json").write_text(timeline.perfetto(self._traces))
            print(f"  wrote {picture} and {self._output / 'trace.json'} (load it at ui.perfetto.dev)")

    def _say(self, what: str, *, eta_s: int = 0) -> None:
        self._stage += 1
        print(f"[{self._stage}/{STAGES}] {what}{f' (about {eta_s} s)' if eta_s else ''}", flush=True)


def stream(url: str, model: Path, messages: list[dict[str, str]], *, show: bool = False) -> Reply:
    """One streamed, greedy chat completion."""
    body = {
        "model": str(model), "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True,
    }  # fmt: skip
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=120)
    try:
        sent_ns = time.monotonic_ns()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status}: {response.read().decode()}")
        pieces, times = [], []
        for piece in _pieces(response):
            times.append(time.monotonic_ns())
            pieces.append(piece)
            if show:
                print(piece.replace("\n", " "), end="", flush=True)
        return Reply("".join(pieces), sent_ns, tuple(times), {k.lower(): v for k, v in response.getheaders()})
    finally:
        connection.close()


def _pieces(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"error in the stream: {event['error']}")
            text = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if text:
                yield text


def leases(host: Host) -> int:
    return sum(host.stats()["store"]["leases"].values())


def mapped_arenas() -> int:
    """Processes of this user that still map a pdx arena."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += "memfd:pdx" in (entry / "maps").read_text()
            except OSError:
                continue
    return count


def wait_for(condition: Callable[[], object], deadline_s: float) -> bool:
    """Looks every 20 ms until the condition holds or the time is over."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def the_document(seed: int = 0) -> str:
    """A lighthouse keeper's log of some 1,500 tokens; different seeds share no prefix."""
    weather = ("calm and clear", "fog until noon", "rain from the west", "a strong gale", "snow in the night")
    events = (
        "a fishing boat with a torn sail came in", "the lamp was cleaned and its oil changed",
        "two ships passed to the north", "the supply boat brought flour, oil and letters",
        "a seal slept on the lower steps", "the bell was rung for three hours",
    )  # fmt: skip
    days = [
        f"Day {day + seed * 100}: {weather[(day * 3 + seed) % 5]}; {events[(day * 5 + seed) % 6]}; "
        f"the keeper, Anna Holm, measured wind force {(day * 7 + seed) % 9}."
        for day in range(1, 47)
    ]
    return "Log of the lighthouse on Grey Rock.\n" + "\n".join(days)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench demo", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the model (default: the one benchmarks/model.py builds)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "demo", help="where pictures go")
    parser.add_argument("--ask", metavar="URL", help="only ask the messages on standard input, print the reply")
    options = parser.parse_args(argv)
    if options.ask:
        reply = stream(options.ask, options.model, json.load(sys.stdin))
        print(json.dumps({"text": reply.text}))
        return 0
    return Demo(options.model or build(), options.output).run()


if __name__ == "__main__":
    sys.exit(main())
