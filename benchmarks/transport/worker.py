"""One end in its own process: python -m benchmarks.transport.worker ARM SIDE CPU MEMORY_FD HOST.

One JSON line a call and one or two an answer.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.transport.ends import BareEnd, End, LaneEnd, lane_end
from benchmarks.transport.libraries import NixlEnd, UcxxEnd
from benchmarks.transport.shapes import SLAB, Shape
from pdx.transport.api import Copy

LAYERS = 30
# What libraries print must not come between.
ANSWERS = os.dup(1)
# Which arms there are, and what makes their ends.
ENDS: dict[str, Callable[..., End]] = {
    "bare sockets": BareEnd,
    "pdx tcp": partial(lane_end, scheme="tcp"),
    "pdx nixl": partial(lane_end, scheme="nixl"),
    "pdx ucx": partial(lane_end, scheme="ucx"),
    "pdx nixl over tcp": partial(lane_end, scheme="nixl"),
    "NIXL": NixlEnd,
    "pdx tcp, TLS 1.3": partial(lane_end, scheme="tls"),
    "NIXL over tcp": partial(NixlEnd, has_thread=True),
    "NIXL over tcp, spinning": NixlEnd,
    "ucxx": UcxxEnd,
}


def answer(end: End, side: str, memory_bytes: int, call: dict[str, Any]) -> dict[str, Any]:
    match call["do"]:
        case "hello":
            return {"hello": end.hello()}
        case "meet":
            end.meet(call["hello"])
            return {}
        case "move":
            puts = Shape(*call["shape"]).puts(memory_bytes)
            return _timed(partial(end.send if side == "source" else end.receive, puts))
        case "latency":
            if side == "target":
                end.pong(SLAB, call["rounds"])
                return {}
            return {"seconds": end.ping(SLAB, call["rounds"])}
        case "arrivals":
            assert isinstance(end, LaneEnd)
            return {"arrivals": end.take_arrivals(call["count"])}
        case "handoffs":
            assert isinstance(end, LaneEnd)
            return {"began": share_out(end, call["queues"], call["puts"], call["slab_bytes"])}
        case "slabs":
            assert isinstance(end, LaneEnd)
            return {"began": last_slabs(end, call["burst_puts"], call["slabs"], call["gap_s"], call["slab_bytes"])}
    raise ValueError(call)


def share_out(end: LaneEnd, queues: int, puts: int, slab_bytes: int) -> float:
    """So many handoffs at once, of so many slabs each; notices are their numbers. When the first was put."""
    began = time.monotonic()
    for number in range(puts):
        for queue in range(queues):
            slab = Copy((number * queues + queue) * slab_bytes, (number * queues + queue) * slab_bytes, slab_bytes)
            end.put([slab], b"%d" % queue, queue=b"handoff %d" % queue, urgency=float(number % LAYERS))
    return began


def last_slabs(end: LaneEnd, burst_puts: int, slabs: int, gap_s: float, slab_bytes: int) -> list[float]:
    """A burst of one handoff, and then, now and then, a last layer's slab of another. When each of these was put."""
    for number in range(burst_puts):
        end.put([Copy(number * slab_bytes, number * slab_bytes, slab_bytes)], b"burst", queue=b"burst", urgency=0.0)
    began = []
    for _ in range(slabs):
        end.rest(gap_s)
        began.append(time.monotonic())
        end.put([Copy(0, 0, slab_bytes)], b"last", queue=b"last", urgency=float(LAYERS - 1))
    return began


def _timed(work: Callable[[], None]) -> dict[str, Any]:
    _say({"ready": True})
    cpu_s, started = time.process_time(), time.monotonic()
    work()
    return {"started": started, "ended": time.monotonic(), "cpu_s": time.process_time() - cpu_s}


def _say(what: dict[str, Any]) -> None:
    os.write(ANSWERS, json.dumps(what).encode() + b"\n")


def main() -> None:
    arm, side, cpu, memory_fd, *host = sys.argv[1:]
    os.dup2(2, 1)
    os.sched_setaffinity(0, {int(cpu)})
    memory_bytes = os.fstat(int(memory_fd)).st_size
    with mmap.mmap(int(memory_fd), memory_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE) as memory:
        end = ENDS[arm](side, memoryview(memory), **({"host": host[0]} if host else {}))
        _say({})
        for line in sys.stdin:
            _say(answer(end, side, memory_bytes, json.loads(line)))
        end.close()
        os._exit(0)  # views into the map live on in libraries


if __name__ == "__main__":
    main()
