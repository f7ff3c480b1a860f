"""The other process of test_tcp_processes: opens a window, says where, and what arrives."""

from __future__ import annotations

import select

from pdx.transport.api import Arrived, Span
from pdx.transport.tcp import TcpLane

KEY = b"0123456789abcdef"
MEMORY_BYTES = 8 << 20


def main() -> None:
    lane = TcpLane("tcp://127.0.0.1:0", key=KEY, name="far")
    memory = bytearray(MEMORY_BYTES)
    window = lane.register(memoryview(memory)).open_window([Span(0, MEMORY_BYTES)])
    print(lane.endpoint, window, flush=True)
    while True:
        select.select([lane.fileno()], [], [], 30.0)
        for event in lane.take_events():
            if isinstance(event, Arrived):
                print(event.notice.decode(), flush=True)


if __name__ == "__main__":
    main()
