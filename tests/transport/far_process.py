"""The other process of a ProcessPair: one lane, driven by one-line JSON calls, its events sent as they come.

python far_process.py URL KEY_HEX MEMORY_FD CALLS_FD
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import sys

from lane_pairs import open_any

from pdx.transport.api import Arrived, Copy, Event, Lane, PeerLost, PutDone, PutFailed, Region, Span, WindowClosed

EVENT_KINDS = {kind.__name__: kind for kind in (PutDone, PutFailed, Arrived, WindowClosed, PeerLost)}


def encode_event(event: Event) -> list[object]:
    fields = [getattr(event, name) for name in event.__struct_fields__]
    return [type(event).__name__, *(field.hex() if isinstance(field, bytes) else field for field in fields)]


def decode_event(raw: list[str]) -> Event:
    kind = EVENT_KINDS[raw[0]]
    return Arrived(int(raw[1]), bytes.fromhex(raw[2])) if kind is Arrived else kind(*raw[1:])


class Far:
    """Answers calls until the parent hangs up."""

    def __init__(self, lane: Lane, memory: mmap.mmap, calls: socket.socket) -> None:
        self._lane = lane
        self._calls = calls
        self._region: Region = lane.register(memoryview(memory))

    def run(self) -> None:
        lines = self._calls.makefile("r")
        self._say({"answer": self._lane.endpoint})
        while True:
            descriptors = [self._calls, *([self._lane.fileno()] if self._lane.fileno() >= 0 else [])]  # closed: -1
            ready, _, _ = select.select(descriptors, [], [], 60.0)
            if self._lane.fileno() in ready:
                self._say({"events": [encode_event(event) for event in self._lane.take_events()]})
            if self._calls in ready:
                line = lines.readline()  # the parent waits for each answer, so that no second line is buffered
                if not line:
                    return
                self._say({"answer": self._call(**json.loads(line))})

    def _call(self, name: str, **arguments: object) -> object:
        match name:
            case "open_window":
                return self._region.open_window([Span(*span) for span in arguments["spans"]])  # type: ignore
            case "close_window":
                return self._region.close_window(arguments["window"])  # type: ignore
            case "connect":
                return self._lane.connect(arguments["endpoint"])  # type: ignore
            case "cancel":
                return self._lane.cancel(bytes.fromhex(arguments["queue"]))  # type: ignore
            case "put":
                arguments["copies"] = [Copy(*copy) for copy in arguments["copies"]]  # type: ignore
                for key in ("notice", "queue"):
                    arguments[key] = bytes.fromhex(arguments[key])  # type: ignore
                return self._lane.put(arguments.pop("channel"), region=self._region, **arguments)  # type: ignore
            case "close":
                self._lane.close(drain_s=arguments["drain_s"])  # type: ignore
                return None
        raise ValueError(name)

    def _say(self, what: dict[str, object]) -> None:
        self._calls.sendall(json.dumps(what).encode() + b"\n")


def main() -> None:
    url, key, memory_fd, calls_fd = sys.argv[1:]
    lane = open_any(url, key=bytes.fromhex(key), name="far")
    memory = mmap.mmap(int(memory_fd), os.fstat(int(memory_fd)).st_size)
    Far(lane, memory, socket.socket(fileno=int(calls_fd))).run()
    lane.abort()


if __name__ == "__main__":
    main()
