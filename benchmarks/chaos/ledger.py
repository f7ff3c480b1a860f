"""What chaos has seen so far: counted, kept on disk for --resume, and told line by line. Safe from any thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks.chaos.call import Heard
from benchmarks.chaos.plan import Fault, Wish
from benchmarks.chaos.verdict import VIOLATIONS, Verdict

SLOWEST_MAX = 10
FINDINGS_MAX = 50  # more of the same teach nothing


class State(msgspec.Struct):
    """What --resume keeps."""

    seed: int
    wishes_begun: int = 0
    faults_done: list[int] = []
    seconds: float = 0.0
    outcomes: dict[str, int] = {}
    turned_away: dict[str, int] = {}
    ways: dict[str, int] = {}  # of right answers
    errors: dict[str, int] = {}
    faults: dict[str, int] = {}
    findings: list[str] = []
    slowest: list[tuple[float, str]] = []


class Ledger:
    """Counts. A finding is something that must not be; it is printed at once."""

    def __init__(self, state: State, path: Path | None = None) -> None:
        self.state = state
        self._path = path
        self._lock = threading.Lock()

    @property
    def seed(self) -> int:
        return self.state.seed

    @property
    def wishes_ended(self) -> int:
        return sum(self.state.outcomes.values())

    @property
    def violations(self) -> dict[str, int]:
        return {kind: self.state.outcomes.get(kind, 0) for kind in sorted(VIOLATIONS)}

    def next_wish(self) -> int:
        with self._lock:
            self.state.wishes_begun += 1
            return self.state.wishes_begun

    def end(self, wish: Wish, verdict: Verdict, heard: Heard) -> None:
        with self._lock:
            state = self.state
            _add(state.outcomes, verdict.kind)
            if verdict.kind == "right":
                _add(state.ways, way_of(heard.headers))
                line = f"{way_of(heard.headers)}, {heard.usage.get('prompt_tokens', '?')} prompt tokens"
                slowest = [*state.slowest, (round(heard.seconds, 2), f"wish {wish.number}: {line}")]
                state.slowest = sorted(slowest, reverse=True)[:SLOWEST_MAX]
            elif verdict.kind == "error":
                _add(state.errors, verdict.detail)
        if verdict.kind in VIOLATIONS:
            request = heard.headers.get("x-request-id", "?")
            self.find(f"{verdict.kind}: {verdict.detail} ({wish}, request {request}, {way_of(heard.headers)})")

    def turned_away(self, verdict: Verdict) -> None:
        with self._lock:
            _add(self.state.turned_away, verdict.detail)

    def fault(self, fault: Fault, phase: str) -> None:
        """It was done, in the phase that was really seen."""
        print(f"  {self.state.seconds:5.0f} s  {fault}{'' if phase == fault.phase else ', not seen'}", flush=True)
        with self._lock:
            self.state.faults_done.append(fault.number)
            _add(self.state.faults, f"{fault.kind} {fault.target} {phase}")

    def find(self, finding: str) -> None:
        print(f"  FOUND  {finding}", flush=True)
        with self._lock:
            if len(self.state.findings) < FINDINGS_MAX:
                self.state.findings.append(finding)

    def keep(self) -> None:
        """Writes the state in one step, if there is a place for it."""
        if self._path is not None:
            with self._lock:
                encoded = msgspec.json.encode(self.state)
            unfinished = self._path.with_suffix(".tmp")
            unfinished.write_bytes(encoded)
            unfinished.replace(self._path)


def way_of(headers: Mapping[str, str]) -> str:
    """How the router says that it went, and why it did not go as a pair if it says so."""
    way = headers.get("x-pdx-way") or ("after" if "x-pdx-prefill" in headers else "alone")
    reason = headers.get("x-pdx-reason", "")
    return f"{way}: {reason}" if reason else way


def table(faults: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Of 'kind target phase': the phases of each 'kind target'."""
    rows: dict[str, Counter[str]] = {}
    for name, count in sorted(faults.items()):
        victim, _, phase = name.rpartition(" ")
        rows.setdefault(victim, Counter())[phase] += count
    return {victim: dict(phases) for victim, phases in rows.items()}


def _add(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1
