"""Ends that use the libraries under the lanes directly, in the fastest way that was found here for each."""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Sequence
from typing import Any

from pdx.transport.api import Copy

FLYING = 8  # transfers under way
WAIT_S = 60.0
# Looks beside NIXL's progress thread. The quickest found on two cores: with 50 us or 1 ms it carries less.
LOOK_EVERY_S = 500e-6


class NixlEnd:
    """NIXL's own Python API. Without its progress thread, who waits makes progress, and spins.

    `has_thread`: with it, as it comes and as vLLM's NixlConnector has it. NIXL has no call that waits, and the thread
    spins on the core that it shares with its user: who waits sleeps between looks then.
    """

    def __init__(self, side: str, memory: memoryview, *, has_thread: bool = False) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self._has_thread = has_thread
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        config = nixl_agent_config(enable_prog_thread=has_thread, backends=["UCX"])
        self._agent: Any = nixl_agent(f"{side}-{secrets.token_hex(4)}", config)
        self._agent.register_memory([(self._address, memory.nbytes, 0, "")], "DRAM")
        self._arrived = 0

    def hello(self) -> str:
        return f"{self._address} {bytes(self._agent.get_agent_metadata()).hex()}"

    def meet(self, hello: str) -> None:
        address, metadata = hello.split()
        self._their_address = int(address)
        self._peer = self._agent.add_remote_agent(bytes.fromhex(metadata))
        if isinstance(self._peer, bytes):
            self._peer = self._peer.decode()

    def send(self, puts: Sequence[Sequence[Copy]]) -> None:
        flying: list[Any] = []
        for put in puts:
            while len(flying) >= FLYING:
                self._collect(flying)
            flying.append(self._start(put, b"landed"))
        while flying:
            self._collect(flying)

    def receive(self, puts: Sequence[Sequence[Copy]]) -> None:
        self._await(len(puts))

    def ping(self, copy: Copy, rounds: int) -> list[float]:
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            self._send_one(copy)
            self._await(1)
            seconds.append(time.perf_counter() - started)
        return seconds

    def pong(self, copy: Copy, rounds: int) -> None:
        for _ in range(rounds):
            self._await(1)
            self._send_one(Copy(copy.target_offset, copy.source_offset, copy.length))

    def close(self) -> None:
        self._agent = None

    def _send_one(self, copy: Copy) -> None:
        flying = [self._start([copy], b"one")]
        while flying:
            self._collect(flying)

    def _start(self, put: Sequence[Copy], notice: bytes) -> Any:
        ours = [(self._address + copy.source_offset, copy.length, 0) for copy in put]
        theirs = [(self._their_address + copy.target_offset, copy.length, 0) for copy in put]
        agent = self._agent
        handle = agent.initialize_xfer(
            "WRITE", agent.get_xfer_descs(ours, "DRAM"), agent.get_xfer_descs(theirs, "DRAM"), self._peer, notice
        )
        if agent.transfer(handle) == "ERR":
            raise ConnectionError("NIXL does not start a transfer")
        return handle

    def _collect(self, flying: list[Any]) -> None:
        """Takes out those that have ended, maybe none."""
        before = len(flying)
        for handle in list(flying):
            state = self._agent.check_xfer_state(handle)
            if state == "ERR":
                raise ConnectionError("a NIXL transfer failed")
            if state == "DONE":
                self._agent.release_xfer_handle(handle)
                flying.remove(handle)
        if len(flying) == before:
            self._leave_core()

    def _leave_core(self) -> None:
        """Nothing was there: what makes progress is let."""
        if self._has_thread:
            time.sleep(LOOK_EVERY_S)

    def _await(self, count: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while self._arrived < count:
            new = sum(len(notices) for notices in self._agent.get_new_notifs().values())
            self._arrived += new
            if time.monotonic() > deadline:
                raise TimeoutError("NIXL delivers no notices")
            if not new:
                self._leave_core()
        self._arrived -= count


class UcxxEnd:
    """ucxx's endpoints without asyncio: tagged messages, which UCX moves by rendezvous, progress made by who waits."""

    def __init__(self, side: str, memory: memoryview) -> None:
        from ucxx._lib import libucxx

        self._ucxx: Any = libucxx
        self._array = __import__("ucxx._lib.arr", fromlist=["Array"]).Array
        self._memory = memory
        self._context = libucxx.UCXContext(feature_flags=(libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
        self._worker = libucxx.UCXWorker(self._context)
        self._tag = libucxx.UCXXTag(1)

    def hello(self) -> str:
        return bytes(self._worker.address).hex()

    def meet(self, hello: str) -> None:
        address = self._ucxx.UCXAddress.create_from_buffer(bytearray.fromhex(hello))
        self._endpoint = self._ucxx.UCXEndpoint.create_from_worker_address(
            self._worker, address, endpoint_error_handling=True
        )

    def send(self, puts: Sequence[Sequence[Copy]]) -> None:
        flying: list[Any] = []
        for copy in (copy for put in puts for copy in put):
            while len(flying) >= FLYING * 2:
                self._progress(flying)
            flying.append(self._send(copy.source_offset, copy.length))
        while flying:
            self._progress(flying)

    def receive(self, puts: Sequence[Sequence[Copy]]) -> None:
        flying: list[Any] = []
        for copy in (copy for put in puts for copy in put):
            while len(flying) >= FLYING * 4:
                self._progress(flying)
            flying.append(self._receive(copy.target_offset, copy.length))
        while flying:
            self._progress(flying)

    def ping(self, copy: Copy, rounds: int) -> list[float]:
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            flying = [self._receive(copy.source_offset, copy.length), self._send(copy.source_offset, copy.length)]
            while flying:
                self._progress(flying)
            seconds.append(time.perf_counter() - started)
        return seconds

    def pong(self, copy: Copy, rounds: int) -> None:
        for _ in range(rounds):
            flying = [self._receive(copy.target_offset, copy.length)]
            while flying:
                self._progress(flying)
            flying = [self._send(copy.target_offset, copy.length)]
            while flying:
                self._progress(flying)

    def close(self) -> None:
        self._endpoint.close_blocking(10_000_000, 100)

    def _send(self, offset: int, length: int) -> Any:
        return self._endpoint.tag_send(self._array(self._memory[offset : offset + length]), self._tag)

    def _receive(self, offset: int, length: int) -> Any:
        return self._worker.tag_recv(self._array(self._memory[offset : offset + length]), self._tag)

    def _progress(self, flying: list[Any]) -> None:
        self._worker.progress()
        for request in list(flying):
            if request.completed:
                request.check_error()
                flying.remove(request)
