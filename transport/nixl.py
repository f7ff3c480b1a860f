"""The nixl lane: NVIDIA's NIXL over its UCX backend. Knows NIXL's calls and nothing of windows or puts.

NIXL's agent is asked for a progress thread that sleeps on descriptors; the Python wrapper `nixl_agent` can't say so,
and its thread spins on a core of its own. Hence the bindings are used directly, as the wrapper does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from pdx.errors import ConfigError, PeerGone, UnknownTransport
from pdx.transport.api import Copy
from pdx.transport.fabric import Memory, Transfer
from pdx.transport.onesided import OneSidedLane
from pdx.transport.rdma import DEVICES, rdma_here
from pdx.transport.reactor import SETTLE_S
from pdx.transport.sockets import STALL_S

SCHEME = "nixl"
BACKEND = "UCX"
# The progress thread sleeps on descriptors for so long at most; 0 would have it spin.
PROGRESS_WAIT_US = 100_000
# Peers that are kept when their channel ends with nothing under way. UCX keeps a connection of a peer that is dropped
# while it lives, and makes another when it is added again: of a link that breaks now and then, one would be left each
# time. Those of peers that have died UCX closes itself.
IDLE_PEERS_MAX = 16


class NixlLane(OneSidedLane):
    """See Lane."""

    def __init__(
        self, url: str, *, key: bytes | None, name: str, stall_s: float = STALL_S, settle_s: float = SETTLE_S
    ) -> None:
        """Raises UnknownTransport if NIXL is not installed, ConfigError if it or the address does not work."""
        super().__init__(
            url, scheme=SCHEME, key=key, name=name, make_fabric=NixlFabric, stall_s=stall_s, settle_s=settle_s,
            devices=rdma_here().devices,
        )  # fmt: skip


class NixlFabric:
    """See Fabric. One agent; its name is new in every life, so that no peer takes it for its predecessor."""

    def __init__(self) -> None:
        leave_efa_out(os.environ)
        try:
            import nixl._bindings as bindings
        except ImportError as error:
            raise UnknownTransport("nixl:// needs NIXL: pip install 'pdx-kv[nixl]'") from error
        self._nixl: Any = bindings
        # NIXL's exceptions have no base of their own.
        self._failure: tuple[type[Exception], ...] = tuple(
            value for value in vars(bindings).values() if isinstance(value, type) and issubclass(value, Exception)
        )
        self._name = f"pdx-{secrets.token_hex(8)}"
        config = bindings.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = PROGRESS_WAIT_US
        config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
        try:
            self._agent: Any = bindings.nixlAgent(self._name, config)
            self._backends = [self._agent.createBackend(BACKEND, {})]
        except Exception as error:
            raise ConfigError(f"NIXL does not start: {error}") from error
        self._kinds = {"DRAM": bindings.DRAM_SEG, "VRAM": bindings.VRAM_SEG}
        self._registered: list[Any] = []
        self._metadata = b""
        self._lock = threading.Lock()
        self._users: Counter[str] = Counter()  # channels that have added a peer and not dropped it
        self._idle: OrderedDict[str, None] = OrderedDict()  # the one left last comes last
        self._broken: set[str] = set()  # would be as broken when they are added again
        self._posted: dict[Transfer, str] = {}  # by whom they go to

    def register(self, memory: Memory) -> None:
        if not memory.length:
            return
        rows = [(memory.address, memory.length, memory.device, "")]
        registration = self._nixl.nixlRegDList(self._kinds[memory.kind], rows)
        try:
            self._agent.registerMem(registration, self._backends)
            self._metadata = bytes(self._agent.getLocalMD())
        except self._failure as error:
            raise ConfigError(f"NIXL cannot register {memory.length} bytes of {memory.kind}: {error}") from error
        self._registered.append(registration)

    def metadata(self) -> bytes:
        return self._metadata

    def add_peer(self, metadata: bytes) -> str:
        peer = self._load(metadata)
        with self._lock:
            self._idle.pop(peer, None)
            self._users[peer] += 1
        return peer

    def update_peer(self, peer: str, metadata: bytes) -> None:
        if self._load(metadata) != peer:
            raise PeerGone("the peer says that it is another one now")

    def write(self, peer: str, *, source: Memory, target: Memory, copies: Sequence[Copy]) -> Transfer:
        rows = self._nixl.nixlXferDList
        ours = [(source.address + copy.source_offset, copy.length, source.device) for copy in copies]
        theirs = [(target.address + copy.target_offset, copy.length, target.device) for copy in copies]
        transfer = 0
        try:
            transfer = self._agent.createXferReq(
                self._nixl.NIXL_WRITE,
                rows(self._kinds[source.kind], ours),
                rows(self._kinds[target.kind], theirs),
                peer,
                "",
                self._backends,
            )
            self._agent.postXferReq(transfer, "")
        except self._failure as error:
            self._release(Transfer(transfer))
            self._broken.add(peer)
            raise PeerGone(f"NIXL: {error}") from error
        self._posted[Transfer(transfer)] = peer
        return Transfer(transfer)

    def is_done(self, transfer: Transfer) -> bool:
        try:
            status = self._agent.getXferStatus(transfer)
            if status == self._nixl.NIXL_IN_PROG:
                return False
            self._agent.releaseXferReq(transfer)
        except self._failure as error:
            raise PeerGone(f"NIXL: {error}") from error
        del self._posted[transfer]
        return True

    def drop_peer(self, peer: str, transfers: Sequence[Transfer]) -> bool:
        if any(self._is_under_way(transfer) for transfer in transfers):
            return False  # to release one is to forget it: the network card goes on
        for transfer in transfers:
            self._release(transfer)
        with self._lock:
            if transfers:
                self._broken.add(peer)
            self._users[peer] -= 1
            if self._users[peer] > 0:
                return True  # other channels write to it
            del self._users[peer]
            self._idle.pop(peer, None)
            if peer not in self._broken:
                self._idle[peer] = None
                if len(self._idle) <= IDLE_PEERS_MAX:
                    return True
                peer, _ = self._idle.popitem(last=False)
        self._forget(peer)
        return True

    def close(self) -> None:
        for transfer in list(self._posted):
            self._release(transfer)
        for registration in self._registered:
            with contextlib.suppress(*self._failure):
                self._agent.deregisterMem(registration, self._backends)
        self._registered.clear()
        self._agent = None  # ends its threads

    def _load(self, metadata: bytes) -> str:
        """The peer's name."""
        if metadata == self._metadata:
            return self._name  # NIXL reaches its own memory without being told of it
        try:
            return str(bytes(self._agent.loadRemoteMD(metadata)), "latin-1")
        except self._failure as error:
            raise PeerGone(f"NIXL does not take the peer's metadata: {error}") from error

    def _is_under_way(self, transfer: Transfer) -> bool:
        with contextlib.suppress(*self._failure):
            return bool(self._agent.getXferStatus(transfer) == self._nixl.NIXL_IN_PROG)
        return False

    def _forget(self, peer: str) -> None:
        self._broken.discard(peer)
        if peer != self._name:
            with contextlib.suppress(*self._failure):  # it may have noticed the peer's end itself
                self._agent.invalidateRemoteMD(peer)

    def _release(self, transfer: Transfer) -> None:
        self._posted.pop(transfer, None)
        with contextlib.suppress(*self._failure):  # what can't be released ends with the peer
            if transfer:
                self._agent.releaseXferReq(transfer)


def leave_efa_out(environ: MutableMapping[str, str], devices: Path = DEVICES) -> None:
    """Has UCX not load its module for EFA where there is no such device and nobody has chosen UCX's modules.

    NIXL's wheel brings that module, but not libefa: the system's comes with the system's libnl, beside the wheel's own,
    and a process with both dies by SIGSEGV when it exits, after all else (seen with NIXL 1.5.1 and rdma-core 44).
    """
    drivers = {(device / "device" / "driver").resolve().name for device in devices.glob("*")}
    if "efa" not in drivers:
        environ.setdefault("UCX_MODULES", "^efa")
