"""`make prove`: every claim of pdx, measured on this machine, one script after the other. Five hours in all.

"tests" are those that `make test` has no time for: more real engines, and more of the same. Their record says how many
passed, and how long each took.

Each writes its own JSON into benchmarks/history/ and can be run alone; timings want a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness.report import Report
from benchmarks.harness.rig import REPOSITORY
from benchmarks.model import build
from pdx.launch import guard

TESTS = "tests"
# Name -> flags of the full run. The cheap ones first: what fails there makes the rest a waste of time.
SCRIPTS: dict[str, tuple[str, ...]] = {
    TESTS: (), "skeleton": (), "fuzz": (), "copier": (), "eviction": (), "tier_disk": (), "transport": (),
    "layouts": (), "routing": (), "router": (), "storm": (), "disconnect": (),
    "identity": (), "handoff": (), "ttft_itl": (), "links": (), "tax": (), "prefix": (),
    "interference": (), "simulate": ("--handoffs", "1000000"), "chaos": ("--requests", "2000", "--faults", "200"),
}  # fmt: skip
WITHOUT_MODEL = (
    TESTS, "simulate", "layouts", "routing", "router", "transport", "fuzz", "storm", "copier", "eviction", "tier_disk",
)  # fmt: skip
WITHOUT_QUICK = (TESTS, "skeleton")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pdx bench prove",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  make prove\n  make prove ARGS=--quick\n  make prove ARGS='handoff links'",
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller honest runs, where a script has one")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's)")
    options = parser.parse_args(argv)
    unknown = set(options.scripts) - set(SCRIPTS)
    if unknown:
        parser.error(f"no script {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    model = options.model or build()
    verdicts = {name: _run(name, model, quick=options.quick) for name in options.scripts or SCRIPTS}
    for name, held in verdicts.items():
        print(f"  {'holds' if held else 'FAILS'}  {name}")
    return 0 if all(verdicts.values()) else 1


def _run(name: str, model: Path, *, quick: bool) -> bool:
    flags = () if name in WITHOUT_MODEL else ("--model", str(model))
    flags += ("--quick",) if quick and name not in WITHOUT_QUICK else SCRIPTS[name]
    print(f"{name} {' '.join(flags)}", flush=True)
    started = time.monotonic()
    if name == TESTS:
        held = _run_tests()
    else:
        held = not _ended([sys.executable, "-m", f"benchmarks.{name}", *flags])
    print(f"{name}: {'holds' if held else 'fails'} after {time.monotonic() - started:.0f} s", flush=True)
    return held


def _ended(command: list[str]) -> int:
    """Its exit status. When we die it gets SIGTERM, at which benchmarks end what they have started."""
    ends_with_us = partial(guard.die_with_parent, signal.SIGTERM)  # this process has one thread
    return subprocess.run(command, cwd=REPOSITORY, preexec_fn=ends_with_us).returncode


def _run_tests() -> bool:
    report = Report(TESTS)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "prove", f"--junitxml={results}"]
        report.equal("exit status of pytest", _ended(command), 0)
        if results.exists():  # else it has ended before all else, which its status says
            judge_tests(ElementTree.parse(results).getroot(), report)
    report.write()
    return report.all_hold


def judge_tests(root: ElementTree.Element, report: Report) -> None:
    """`root`: what pytest writes with --junitxml."""
    cases = list(root.iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    report.bar("tests that passed", len(cases) - skipped - len(bad), f"{len(cases) - skipped}", bool(cases) and not bad)
    report.figures["skipped"] = skipped
    report.figures["failed"] = bad
    report.figures["seconds"] = {
        f"{case.get('classname')}::{case.get('name')}": float(case.get("time", 0)) for case in cases
    }


if __name__ == "__main__":
    sys.exit(main())
