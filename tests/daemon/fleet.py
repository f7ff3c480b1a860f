"""Real pdxd processes and bare engines (client, no model) for tests of the daemon.

A `BareEngine` speaks the whole ENGINE conversation as an engine would, with pages of known bytes instead of KV.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash
from daemon.forkserver import ADDRESS, Forked

from pdx.buffer.headers import Headers
from pdx.client import DaemonClient
from pdx.config import Config, flags_of, load
from pdx.handoff.handle import TransferHandle, mint
from pdx.keys import ContentFingerprint, LayoutFingerprint, tail_hash
from pdx.layout import PageLayout, Place
from pdx.wire import (
    Ask,
    Attach,
    Budgets,
    DaemonRef,
    EngineInfo,
    Filled,
    FilledEntry,
    Finished,
    Keep,
    LetGo,
    LoadEnded,
    LoadOpened,
    LookUp,
    Message,
    OpenLoad,
    OpenSend,
    SendEnded,
    SendOpened,
)

PAGES = PageLayout(layers=3, page_bytes=8192, chunk_blocks=2)
BLOCK_TOKENS = 16
DEADLINE_S = 20.0
M = TypeVar("M", bound=Message)
USUAL = Budgets()
QUICK = Budgets(grant_s=1.0, slab_s=1.0, total_s=10.0, claim_s=0.5)


def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> object:
    """The first true value of `condition`. Polls at 5 ms; fails with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.005)


class Daemon:
    """One pdxd process in a run directory of its own. `program`: a file to run instead of pdxd."""

    def __init__(self, run_dir: Path, key_file: Path, *, program: str = "", **settings: str) -> None:
        self.run_dir = run_dir
        self.config: Config = load(
            {
                "run_dir": str(run_dir), "key_file": str(key_file), "arena": "4MiB", "linger_s": "60",
                "poison": "true", "digest_mode": "true", **settings,
            }, environ={},
        )  # fmt: skip
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log = (run_dir / "log").open("wb")
        flags = [f"--run-dir={run_dir}", *flags_of(self.config)]
        self.process: Forked | subprocess.Popen[bytes]
        if ADDRESS in os.environ and not program and "PYTHONPATH" not in os.environ:  # which says what to import
            self.process = Forked(flags, Path(self._log.name))
        else:
            command = [sys.executable, *([program] if program else ["-m", "pdx.daemon.main"]), *flags]
            self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        until(lambda: (run_dir / "pdxd.json").exists() or self.process.poll() is not None, "pdxd serves")
        assert self.process.poll() is None, (run_dir / "log").read_text()
        self.tool = DaemonClient.attach(self.config, Attach(kind="tool"), deadline_s=5, start=False)
        self.ref: DaemonRef = self.tool.attached.daemon

    def stats(self) -> dict:
        return self.tool.ask(Ask(verb="stats")).body

    def counter(self, name: str) -> int:
        return self.stats()["counters"].get(name, 0)

    def check(self) -> None:
        answer = self.tool.ask(Ask(verb="check"))
        assert not answer.error, answer.error

    def wait_unleased(self) -> None:
        """Every lease has ended, no half of a handoff is left, and the books agree."""

        def quiet() -> bool:
            stats = self.stats()
            leases, slots = stats["store"]["leases"], stats["store"]["slots"]
            return not any(leases.values()) and not stats["handoffs"] and not slots["filling"] + slots["quarantine"]

        until(quiet, f"all leases end: {self.stats()}")
        self.check()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(5)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        self.tool.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.close()


def page_bytes_of(block_name: bytes, layer: int) -> bytes:
    """The known content of one page: different for every block and layer."""
    seed = hashlib.blake2b(block_name + bytes([layer]), digest_size=32).digest()
    return seed * (PAGES.page_bytes // 32)


class Prompt:
    """Tokens in a chain of blocks."""

    def __init__(self, tokens: list[int], salt: bytes = b"") -> None:
        self.tokens = tokens
        self.hashes: list[bytes] = []
        parent = salt
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            packed = repr(tokens[start : start + BLOCK_TOKENS]).encode()
            parent = hashlib.sha256(parent + packed).digest()
            self.hashes.append(parent)
        self.tail = tail_hash(parent, tokens[len(self.hashes) * BLOCK_TOKENS :])

    @property
    def names(self) -> list[bytes]:
        return self.hashes + ([self.tail] if self.tail else [])


def prompt_of(tokens: int, seed: int = 0) -> Prompt:
    return Prompt([seed * 100_000 + n for n in range(tokens)])


class BareEngine:
    """The sessions of one engine's scheduler and workers, in this process."""

    def __init__(
        self, daemon: Daemon, name: str, role: str = "both", *, model: str = "m", layout: str = "L", ranks: int = 1,
        algorithm: str = "sha", url: str = "", router: str = "",
    ) -> None:  # fmt: skip
        self.pages = msgspec.structs.replace(PAGES, layers=PAGES.layers * ranks, shards=ranks)
        content = ContentFingerprint(
            model=model, weights="w", weight_epoch="", dtype="bf16", block_tokens=BLOCK_TOKENS, hash_algorithm=algorithm
        )
        fingerprint = LayoutFingerprint(
            engine="bare 1", attention="none", layers=PAGES.layers, page_bytes=PAGES.page_bytes,
            block_tokens=BLOCK_TOKENS, packing=layout, kv_groups=1, ranks=ranks,
            chunk_blocks=PAGES.chunk_blocks,
        )  # fmt: skip
        info = EngineInfo(engine_id=name, role=role, model=model, url=url, content=content, layout=fingerprint)  # type: ignore[arg-type]
        self.daemon, self.name, self.step = daemon, name, 0
        self.info = info
        self.scheduler = DaemonClient.attach(
            daemon.config, Attach(kind="scheduler", engine=info, router=router), start=False
        )
        self.workers = [self.attach_worker(rank) for rank in range(ranks)]
        self.tenant = b""  # of the requests that come by handoffs
        self._inbox: list[Message] = []

    @property
    def worker(self) -> DaemonClient:
        """Of rank 0."""
        return self.workers[0]

    def attach_worker(self, rank: int) -> DaemonClient:
        hello = Attach(kind="worker", engine=self.info, pages=self.pages, rank=rank)
        return DaemonClient.attach(self.daemon.config, hello, start=False)

    def expect(self, kind: type[M], deadline_s: float = DEADLINE_S) -> M:
        """The next message of this kind; others stay for later."""

        def look() -> M | None:
            self._inbox += self.scheduler.poll()
            found = next((m for m in self._inbox if isinstance(m, kind)), None)
            if found is not None:
                self._inbox.remove(found)
            return found

        return until(look, f"{self.name} hears {kind.__name__}; has {self._inbox}", deadline_s)  # type: ignore[return-value]

    def open_send(self, prompt: Prompt, handle: str) -> SendOpened:
        self.ask_send(prompt, handle)
        return self.expect(SendOpened)

    def ask_send(self, prompt: Prompt, handle: str) -> None:
        self.scheduler.send(
            OpenSend(
                request_id="r", handle=handle, block_hashes=prompt.hashes, prompt_tokens=len(prompt.tokens),
                tail_hash=prompt.tail, tenant=self.tenant,
            )
        )  # fmt: skip

    def fill(self, opened: SendOpened, prompt: Prompt, blocks: list[int], layers: range | None = None) -> None:
        """One step that computes these blocks, layer by layer, as an engine's workers do, one behind the other."""
        self.step += 1
        blocks = [block for block in blocks if opened.places[block] is not None]
        for layer in layers if layers is not None else range(self.pages.layers):
            for block in blocks:
                self.write_page(opened.places[block], page_bytes_of(prompt.names[block], layer), layer)
            entry = FilledEntry(handoff_id=opened.handoff_id, blocks=blocks)
            now = time.monotonic_ns()
            filled = Filled(step=self.step, step_started_ns=now, layer=layer, filled_ns=now, entries=[entry])
            self.workers[layer // self.pages.shard_layers].send(filled)
        self.publish_fences()

    def publish_fences(self) -> None:
        for worker in self.workers:
            worker.publish_fence(self.step)

    def write_page(self, place: Place | None, content: bytes, layer: int) -> None:
        arena = self.worker.arena
        assert arena is not None and place is not None
        start = place.page_offset(self.pages, layer)
        arena.memory[start : start + PAGES.page_bytes] = content
        arena.set_checksum(place, layer, xxhash.xxh3_64_intdigest(content))
        shard, layer_of_shard = divmod(layer, self.pages.shard_layers)
        arena.set_watermark(place.header_offset, layer_of_shard + 1, shard)

    def let_go(
        self, handoff_id: bytes, side: str, *, ok: bool = True, fence: int | None = None, pages: int = 0
    ) -> None:
        self.scheduler.send(
            LetGo(
                handoff_id=handoff_id,
                side=side,
                fence=self.step if fence is None else fence,
                ok=ok,
                pages=pages,  # type: ignore[arg-type]
            )
        )

    def prefill(self, prompt: Prompt, handle: str) -> SendOpened:
        """A whole prompt in one step."""
        opened = self.open_send(prompt, handle)
        self.fill(opened, prompt, list(range(len(prompt.names))))
        self.let_go(opened.handoff_id, "send")
        return opened

    def open_load(self, prompt: Prompt, handle: str) -> LoadOpened:
        """Asks until the answer is not "wait"."""

        def ask() -> LoadOpened | None:
            self.scheduler.send(
                OpenLoad(
                    request_id="r", handle=handle, block_hashes=prompt.hashes, prompt_tokens=len(prompt.tokens),
                    tail_hash=prompt.tail, tenant=self.tenant,
                )
            )  # fmt: skip
            answer = self.expect(LoadOpened)
            return None if answer.status == "wait" else answer

        return until(ask, f"{self.name} gets an answer other than wait")  # type: ignore[return-value]

    def pages_present(self, loaded: LoadOpened, prompt: Prompt) -> int:
        """How many pages are there; every one of them is checked byte by byte, with its generation."""
        arena = self.worker.arena
        assert arena is not None
        count = 0
        for place, name in zip(loaded.places, prompt.names, strict=False):
            for layer in self._layers_present(arena, place):
                start = place.page_offset(self.pages, layer)
                content = bytes(arena.memory[start : start + PAGES.page_bytes])
                assert arena.generation(place.header_offset) == place.generation
                assert content == page_bytes_of(name, layer), f"block {name.hex()[:8]} layer {layer} is wrong"
                assert arena.checksum(place, layer) == xxhash.xxh3_64_intdigest(content)
                count += 1
        return count

    def _layers_present(self, arena: Headers, place: Place) -> Iterator[int]:
        for shard in range(self.pages.shards):
            first = shard * self.pages.shard_layers
            yield from range(first, first + arena.watermark(place.header_offset, shard))

    def load(self, prompt: Prompt, handle: str) -> int:
        """A whole load: every promised page arrives and is right. Returns the number of blocks loaded."""
        loaded = self.open_load(prompt, handle)
        if loaded.status == "absent":
            return 0
        wanted = len(loaded.places) * self.pages.layers
        until(lambda: self.pages_present(loaded, prompt) == wanted, "all promised pages land")
        self.step += 1
        self.publish_fences()
        self.let_go(loaded.handoff_id, "load", pages=wanted)
        return len(loaded.places)

    def keep(self, hashes: list[bytes], tenant: bytes = b"", origin: bytes = b"") -> None:
        """These blocks, computed in one step by a request without a handle, or that came by the handoff `origin`."""
        self.let_go(self.open_keep(hashes, tenant, origin).handoff_id, "send")

    def open_keep(self, hashes: list[bytes], tenant: bytes = b"", origin: bytes = b"") -> SendOpened:
        """The same up to its end."""
        lot = os.urandom(16)
        request_id = lot.hex()  # of another request each
        keep = Keep(request_id=request_id, handoff_id=lot, block_hashes=hashes, tenant=tenant, origin=origin)
        self.scheduler.send(keep)
        opened = self.expect(SendOpened)
        self.step += 1
        for place, name in zip(opened.places, hashes, strict=True):
            for layer in range(self.pages.layers if place is not None else 0):
                self.write_page(place, page_bytes_of(name, layer), layer)
        self.publish_fences()
        return opened

    def finish(self, handoff_id: bytes) -> None:
        """The request that came by this handoff is over."""
        self.scheduler.send(Finished(handoff_id=handoff_id))

    def look_up(self, hashes: list[bytes], tenant: bytes = b"") -> int:
        """How many blocks a request would get now."""
        answer = self.open_look_up(hashes, tenant)
        self.let_go(answer.handoff_id, "load")
        return len(answer.places)

    def open_look_up(self, hashes: list[bytes], tenant: bytes = b"") -> LoadOpened:
        self.scheduler.send(LookUp(request_id="l", handoff_id=os.urandom(16), block_hashes=hashes, tenant=tenant))
        return self.expect(LoadOpened)

    def expect_failed_send(self) -> SendEnded:
        ended = self.expect(SendEnded)
        self.let_go(ended.handoff_id, "send", ok=False)
        return ended

    def expect_failed_load(self) -> LoadEnded:
        ended = self.expect(LoadEnded)
        self.let_go(ended.handoff_id, "load", ok=False)
        return ended

    def close(self) -> None:
        for client in (self.scheduler, *self.workers):
            client.close()


class Fleet:
    """Daemons and engines of one test, and the router's part: minting handles."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.key_file = directory / "cluster.key"
        self.key_file.write_bytes(secrets.token_bytes(32))
        self.key_file.chmod(0o600)
        self.daemons: list[Daemon] = []
        self.engines: list[BareEngine] = []

    def daemon(self, **settings: str) -> Daemon:
        return self.daemon_in(self._directory / f"d{len(self.daemons)}", **settings)

    def daemon_in(self, run_dir: Path, **settings: str) -> Daemon:
        daemon = Daemon(run_dir, self.key_file, **settings)
        self.daemons.append(daemon)
        return daemon

    def engine(self, daemon: Daemon, name: str, *, ranks: int = 1, **about: str) -> BareEngine:
        engine = BareEngine(daemon, name, ranks=ranks, **about)
        self.engines.append(engine)
        return engine

    def handle(self, prefill: BareEngine, decode: BareEngine, budgets: Budgets = USUAL, **changes: object) -> str:
        handle = TransferHandle(
            handoff_id=os.urandom(16), attempt=1, prefill_engine=prefill.name, decode_engine=decode.name,
            prefill_daemon=prefill.daemon.ref, decode_daemon=decode.daemon.ref, budgets=budgets,
            issued_unix_s=time.time(),
        )  # fmt: skip
        return mint(msgspec.structs.replace(handle, **changes), self.key_file.read_bytes())

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for daemon in self.daemons:
            daemon.stop()


@contextlib.contextmanager
def fleet_in(directory: Path) -> Iterator[Fleet]:
    fleet = Fleet(directory)
    try:
        yield fleet
    finally:
        fleet.close()
