"""The naive variant of pushing: a pdxd that, while told so, sends nothing before a prompt's last page is filled.

It is pdxd as it is in every other respect, so that a bar which it misses is a bar that pushing while computing holds.
`after_prefill(run_dir)` tells it so, for every handoff that opens in the meantime: both ways are then measured in turns
on the same processes. Run as `python -m benchmarks.naive.late`, with pdxd's own flags.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdx.daemon import main as daemon
from pdx.daemon import sending
from pdx.handoff.actions import Action
from pdx.handoff.sender import Sender

SIGN = "after-prefill"  # a file of this name in the run directory


@contextlib.contextmanager
def after_prefill(run_dir: Path) -> Iterator[None]:
    sign = run_dir / SIGN
    sign.touch()
    try:
        yield
    finally:
        sign.unlink()


class LateSender(Sender):
    """Holds every put back until the whole prompt is there, if the sign stands when the handoff opens."""

    sign = Path(SIGN)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._late = self.sign.exists()

    def _go_on(self) -> list[Action]:
        return [] if self._late and not self._published else super()._go_on()


def main() -> int:
    flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
    LateSender.sign = Path(flags["--run-dir"]) / SIGN
    vars(sending)["Sender"] = LateSender
    return daemon.main()


if __name__ == "__main__":
    sys.exit(main())
