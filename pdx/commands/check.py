"""`pdx check`: what this machine can run and how fast its lanes are, one line per item, each with its fix."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from pdx.commands.finding import Finding

EXAMPLES = """examples:
  pdx check                          is this machine ready, and what would make it better?
  PDX_ARENA=16GiB pdx check          would that arena fit?
  PDX_HOST=10.0.0.1 pdx check        can other hosts reach a daemon here?
  pdx check --lanes none             only look: no figures, half a second
  pdx check --format json | jq '.[] | select(.state != "ok")'"""


def main(argv: list[str] | None = None) -> int:
    """0 if everything that is needed is here, else 1."""
    options = _parser().parse_args(argv)
    findings: list[Finding] = []
    for finding in look(options.lanes):
        findings.append(finding)
        if options.format == "table":
            print(_row(finding), flush=True)  # figures take a while: what is known is shown
    if options.format == "json":
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    return 0 if all(finding.state != "missing" for finding in findings) else 1


def look(lanes: Sequence[str] | None) -> Iterator[Finding]:
    """Everything worth knowing, the needed first. `lanes`: the schemes to try; None: all that are known here."""
    from pdx.commands import machine
    from pdx.commands.lane_figures import lane_findings, memory_finding

    yield from machine.look()
    if lanes != []:
        yield memory_finding()
    yield from lane_findings(lanes)


def _row(finding: Finding) -> str:
    mark = {"ok": "ok", "missing": "MISSING", "absent": "absent"}[finding.state]
    row = f"{mark:<8} {finding.item:<14} {finding.line}"
    return f"{row}\n{'':<24}-> {finding.fix}" if finding.fix else row


def _lanes(text: str) -> list[str]:
    return [] if text == "none" else [name for name in text.split(",") if name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx check", description="Says what this machine can run, and what is missing for the rest.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--format", choices=("table", "json"), default="table", help="(default: %(default)s)")
    parser.add_argument(
        "--lanes",
        type=_lanes,
        metavar="LIST",
        help="lanes to try, with commas between; none: no figures (default: all)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
