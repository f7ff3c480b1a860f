"""The naive variant of waiting: a pdxd that, while told so, never sleeps but asks again and again, as polling lanes do.

`polling(run_dirs)` tells it so, so that both ways are measured in turns on the same processes. It is pdxd as it is in
every other respect. Run as `python -m benchmarks.naive.polling`, with pdxd's own flags.
"""

from __future__ import annotations

import contextlib
import select
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from pdx.daemon import main as daemon

SIGN = "polling"  # a file of this name in the run directory
LOOK_S = 0.02  # how often it is looked for


@contextlib.contextmanager
def polling(run_dirs: Sequence[Path]) -> Iterator[None]:
    signs = [run_dir / SIGN for run_dir in run_dirs]
    for sign in signs:
        sign.touch()
    try:
        yield
    finally:
        for sign in signs:
            sign.unlink()


def poll_while_told(sign: Path, over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        while sign.exists():
            for _ in range(1000):
                select.select([], [], [], 0)


def main() -> int:
    flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
    over = threading.Event()
    thread = threading.Thread(target=poll_while_told, args=(Path(flags["--run-dir"]) / SIGN, over))
    thread.start()
    try:
        return daemon.main()
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
