"""What the GPU data path costs beside what the GPU and its bus can do. Needs an NVIDIA GPU, torch and cuda.core.

    python -m benchmarks.device [--quick] [--json FILE]        some 3 minutes; 1 with --quick

Everything is compared byte for byte before it is timed, the arms of a table take turns, and medians count. The naive
variants are what one writes first: pages copied one by one, and copies on the engine's own stream. `nvcc` and
`compute-sanitizer`, where they are installed, run the kernels' own self-test.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.device import beside, bus, kernels
from benchmarks.device.common import KIB, MIB, PAGE_BYTES, PAGE_OF_8B_MODEL, build, pinned_arena
from benchmarks.harness.measure import table
from benchmarks.harness.report import Report, options
from pdx.engine.streams import Copy
from pdx.engine.ways import rates_of

SOURCE = Path(__file__).resolve().parent.parent.parent / "cuda" / "page_copy.cu"
ROUNDS, QUICK_ROUNDS = 15, 5
PARTS = ("kernels", "bus", "choice", "host", "sanitizer", "beside")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pdx bench device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser)
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.device needs an NVIDIA GPU that torch can use; `pdx check` says what is missing")
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    report = Report("device")
    report.figures["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory(prefix="pdx-device-") as name:
        parts = {
            "kernels": partial(kernels.measure, report, Path(name), rounds),
            "bus": partial(bus.measure, report, Path(name), rounds),
            "choice": partial(choice, report, Path(name)),
            "host": partial(host_time, report, Path(name)),
            "sanitizer": partial(sanitizer, report, 20 if arguments.quick else 300),
            "beside": partial(beside.measure, report, Path(name), rounds),
        }
        for part in [arguments.only] if arguments.only else PARTS:
            parts[part]()
    report.write(arguments.json)
    sys.exit(0 if report.all_hold else 1)


def choice(report: Report, folder: Path) -> None:
    rows = []
    for page_bytes in PAGE_BYTES:
        bench = build(page_bytes, 64 * MIB, folder)
        rates = rates_of(bench.device, folder)
        rows.append((f"{page_bytes // KIB} KiB", f"{rates.staged:.1f}", f"{rates.straight:.1f}",
                     "straight" if rates.loads_straight else "staged"))  # fmt: skip
        report.figures[f"loads of {page_bytes // KIB} KiB pages"] = {
            "staged": rates.staged, "straight": rates.straight, "chosen": rows[-1][-1],
        }  # fmt: skip
    table("arena -> blocks, GB/s: which way an engine with such pages takes", ("page", "staged", "straight", ""), rows)


def host_time(report: Report, folder: Path) -> None:
    """What one layer of one step costs the thread that runs the model: 128 pages in 8 slabs (2,048 tokens)."""
    bench = build(PAGE_OF_8B_MODEL, 64 * MIB, folder)
    device = bench.device
    with pinned_arena(device) as pinned:
        kernels_, copying, staging = device.new_stream(), device.new_stream(), device.new_staging(128)
        blocks = device.block_list(kernels_, bench.ids[:128])
        copies = [Copy(n * 16, 16, n * MIB) for n in range(8)]
        times = []
        for _ in range(200):
            started = time.perf_counter()
            device.wait(kernels_, device.record(device.compute_stream()))
            digests = device.gather(kernels_, 0, blocks, 0, 128, staging)
            device.wait(copying, device.record(kernels_))
            device.copy_out(copying, staging, pinned, copies)
            emptied = device.record(copying)
            times.append(time.perf_counter() - started)
            device.synchronize(emptied)
            digests.read()
    usual, first = (round(seconds * 1e6, 1) for seconds in (statistics.median(times), times[0]))
    report.figures["host time of a layer, us"] = {"median": usual, "first": first}
    print(f"  host time of one layer of a step of 2,048 tokens: {usual:.0f} us; of the first {first:.0f}")


def sanitizer(report: Report, cases: int) -> None:
    """The kernels' self-test, plain and under compute-sanitizer. Without the tools it says so, and sets no bar."""
    if not (shutil.which("nvcc") and shutil.which("compute-sanitizer")):
        print("  nvcc or compute-sanitizer is not installed: the sanitizer's part is left out")
        report.figures["compute-sanitizer"] = "not installed"
        return
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "page_copy")
        subprocess.run(["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-DPDX_SELF_TEST", str(SOURCE),
                        "-o", program], check=True, timeout=120)  # fmt: skip
        arms = {
            "self-test": [program, str(cases), "test"],
            "memcheck": ["compute-sanitizer", "--error-exitcode", "9", program, "3", "test"],
            "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", program, "3", "test"],
            "initcheck": ["compute-sanitizer", "--tool", "initcheck", "--error-exitcode", "9", program, "3", "test"],
        }
        for name, command in arms.items():
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
            report.equal(f"kernels, {name}: exit status", done.returncode, 0)
            print("    " + " ".join(line for line in done.stdout.splitlines() if "self-test" in line or "SUMM" in line))


if __name__ == "__main__":
    main()
