"""What a prefix that was computed before is worth: hits, questions about documents, and what saving costs for nothing.

One engine with a pdxd against the same engine without, against one whose own cache holds everything, and, where it is
installed, LMCache's multi-process mode. The full run takes about 40 minutes.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.harness.arms import Scratch
from benchmarks.harness.measure import pin_client
from benchmarks.harness.report import Report, options
from benchmarks.model import build
from benchmarks.prefix import documents, hits, zero
from benchmarks.prefix.engines import pdx, plain

PARTS = ("hits", "documents", "zero")
ARENA = "1536MiB"
UNLIMITED_FLAGS = ("--kv-cache-memory-bytes", str(1280 << 20))


def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench prefix", description=__doc__.partition("\n")[0])
    options(parser)
    parser.add_argument("--only", choices=PARTS, help="one section (default: all)")
    chosen = parser.parse_args()
    wanted = [chosen.only] if chosen.only else PARTS
    pin_client()
    report = Report("prefix")
    with Scratch(chosen.model or build()) as scratch:
        ours = pdx(scratch, "pdx", arena=ARENA)
        if "hits" in wanted:
            hits.measure([ours], 2 if chosen.quick else 9, report)
        if "zero" in wanted:
            controls = [plain(scratch, zero.BASE), plain(scratch, zero.CONTROL)]
            zero.measure([controls[0], ours, controls[1]], 3 if chosen.quick else 20, report)
        if "documents" in wanted:
            small = next((arm for arm in scratch.arms if arm.name == documents.SMALL), None) or plain(
                scratch, documents.SMALL
            )
            unlimited = plain(scratch, documents.UNLIMITED, UNLIMITED_FLAGS)
            documents.measure([ours, unlimited, small], documents.QUICK if chosen.quick else documents.FULL, report)
        for arm in scratch.arms:
            report.arm(arm)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
