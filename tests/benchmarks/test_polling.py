"""The pdxd that polls does so while its sign stands, and ends when it is told."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from benchmarks.naive.polling import SIGN, poll_while_told, polling


def test_it_polls_while_the_sign_stands(tmp_path: Path) -> None:
    over = threading.Event()
    thread = threading.Thread(target=poll_while_told, args=(tmp_path / SIGN, over))
    thread.start()
    try:
        with polling([tmp_path]):
            started, deadline = time.process_time(), time.monotonic() + 10
            while time.process_time() - started < 0.05:  # ours is none: we sleep
                assert time.monotonic() < deadline
                over.wait(0.01)
        assert not (tmp_path / SIGN).exists()
    finally:
        over.set()
        thread.join(10)
    assert not thread.is_alive()
