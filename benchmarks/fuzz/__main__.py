"""Anything at all into every decoder: a million frames each, of which none may crash it or make it grow.

Frames are right ones after a few accidents, drawn from --seed; a finding prints the frame and what it raised.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from pathlib import Path

from benchmarks.fuzz.targets import Target, targets
from benchmarks.harness.measure import table
from benchmarks.harness.report import Report, options

FRAMES, QUICK_FRAMES = 1_000_000, 20_000
# A decoder that kept ten bytes of each frame would be seen, in a quick run thirty: below NOISE_BYTES growth is the
# allocator's, of which nine quick runs of all decoders had up to 340 KiB.
FRAME_BYTES, NOISE_BYTES = 9, 512 << 10
WARM_SHARE = 10  # a tenth of the frames, before memory is looked at first


class Finding(Exception):
    """A frame that a decoder did not survive."""


def feed(target: Target, rng: random.Random, frames: int) -> int:
    """How many of them were taken for right ones. Raises Finding."""
    taken = 0
    for _ in range(frames):
        frame = target.frame(rng)
        try:
            target.feed(frame)
        except target.may_raise:
            continue
        except Exception as error:
            raise Finding(f"{target.name}: {frame!r} raised {error!r}") from error
        taken += 1
    return taken


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def growth_limit(frames: int) -> int:
    """How many bytes a decoder may grow by in so many frames."""
    return max(NOISE_BYTES, FRAME_BYTES * frames)


def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench fuzz", description=__doc__.partition("\n")[0])
    options(parser)
    parser.add_argument("--frames", type=int, help=f"for each decoder (default {FRAMES:,}; {QUICK_FRAMES:,} if quick)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="PART", help="decoders whose names contain it")
    chosen = parser.parse_args()
    frames = chosen.frames or (QUICK_FRAMES if chosen.quick else FRAMES)
    report, rows = Report("fuzz"), []
    for target in targets():
        if chosen.only not in target.name:
            continue
        rng, started = random.Random(f"{chosen.seed} {target.name}"), time.monotonic()
        finding, grown_bytes, taken = "", 0, 0
        warm = frames // WARM_SHARE
        try:
            taken = feed(target, rng, warm)
            before_bytes = resident_bytes()
            taken += feed(target, rng, frames - warm)
            grown_bytes = resident_bytes() - before_bytes
        except Finding as found:
            finding = str(found)
        seconds, limit_bytes = time.monotonic() - started, growth_limit(frames - warm)
        report.bar(f"{target.name}: {frames:,} frames", finding or "survived", "survived", not finding)
        report.bar(
            f"{target.name}: growth", grown_bytes >> 10, f"<= {limit_bytes >> 10}", grown_bytes <= limit_bytes,
            unit="KiB",
        )  # fmt: skip
        rows.append((target.name, f"{frames / seconds:,.0f}", f"{taken / frames:.1%}", f"{grown_bytes >> 10}"))
    table("", ("decoder", "frames/s", "taken", "growth KiB"), rows)
    report.figures["rows"] = rows
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
