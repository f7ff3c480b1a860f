"""The ucx lane: UCX through ucxx. Knows UCX's calls and nothing of windows or puts.

ucxx makes the worker, its progress thread and the endpoints; its Python side has no one-sided writes, so those few
functions of libucp, which ucxx has loaded, are called as C. Their structs are of a stable ABI: fields are only added.

Over a network without RDMA, UCX emulates one-sided writes: the side that is written to answers each of them, and where
such an answer meets a writer that was killed, UCX (1.21) calls abort(), `ucp_request.inl: Fatal: unexpected error:
Endpoint timeout`, in one kill of five. A peer's death must not be ours, so such a machine has no ucx lane.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec

from pdx.errors import ConfigError, PeerGone, UnknownTransport
from pdx.transport.api import Copy
from pdx.transport.fabric import Memory, Transfer
from pdx.transport.onesided import OneSidedLane
from pdx.transport.rdma import rdma_here
from pdx.transport.reactor import SETTLE_S
from pdx.transport.sockets import STALL_S

SCHEME = "ucx"
# A forced close of an endpoint cancels what is under way and ends in a few rounds of progress; the lane waits for it.
CLOSE_PERIOD_NS, CLOSE_ATTEMPTS = 10_000_000, 10

# Rounds of progress for one question, while there is some: a large copy within one host takes a round per 512 KiB.
PROGRESS_ROUNDS = 16


class UcxLane(OneSidedLane):
    """See Lane."""

    def __init__(
        self, url: str, *, key: bytes | None, name: str, stall_s: float = STALL_S, settle_s: float = SETTLE_S,
        emulated: bool = False,
    ) -> None:  # fmt: skip
        """`emulated`: also where UCX emulates writes and may end this process with a peer's. For tests and benchmarks.

        Raises UnknownTransport if ucxx is not installed, ConfigError if it or the address does not work.
        """
        make_fabric = partial(UcxFabric, emulated=emulated)
        super().__init__(
            url, scheme=SCHEME, key=key, name=name, make_fabric=make_fabric, stall_s=stall_s,
            settle_s=settle_s, devices=rdma_here().devices,
        )  # fmt: skip


class UcxFabric:
    """See Fabric. One worker, one endpoint a channel: to break with one, or its failure, is nothing to any other."""

    def __init__(self, *, emulated: bool) -> None:
        try:
            from ucxx._lib import libucxx
        except ImportError as error:
            raise UnknownTransport("ucx:// needs ucxx: pip install 'pdx-kv[ucx]'") from error
        lack = rdma_here().lack
        if lack and not emulated:
            raise ConfigError(
                "ucx:// needs RDMA, since without it UCX emulates writes and aborts when a peer dies; " + lack
            )
        self._ucxx: Any = libucxx
        try:
            features = (libucxx.Feature.RMA, libucxx.Feature.WAKEUP)
            self._context: Any = libucxx.UCXContext(feature_flags=features)
            self._worker: Any = libucxx.UCXWorker(self._context)
            self._worker.start_progress_thread(polling_mode=False, epoll_timeout=100)
            self._ucp = _Ucp(self._context.handle, self._worker.handle)
        except (libucxx.UCXError, OSError, RuntimeError) as error:
            raise ConfigError(f"UCX does not start: {error}") from error
        self._lock = threading.Lock()
        self._own = _Metadata(bytes(self._worker.address), [])
        self._memories: list[int] = []  # UCX's handles of them
        self._peers: dict[str, _Peer] = {}  # by names that are never used again
        self._numbers = itertools.count(1)
        self._flushes: dict[Transfer, _Flush] = {}

    def register(self, memory: Memory) -> None:
        if not memory.length:
            return
        handle, rkey = self._ucp.register(memory)
        with self._lock:
            self._memories.append(handle)
            self._own = _Metadata(self._own.worker, [*self._own.regions, (memory.address, memory.length, rkey)])

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._own)

    def add_peer(self, metadata: bytes) -> str:
        try:
            told = msgspec.msgpack.decode(metadata, type=_Metadata)
            address = self._ucxx.UCXAddress.create_from_buffer(bytearray(told.worker))
            endpoint = self._ucxx.UCXEndpoint.create_from_worker_address(
                self._worker, address, endpoint_error_handling=True
            )
        except (msgspec.MsgspecError, self._ucxx.UCXError, RuntimeError) as error:
            raise PeerGone(f"UCX does not take the peer's metadata: {error}") from error
        name = f"{told.worker.hex()}/{next(self._numbers)}"
        self._peers[name] = _Peer(told.worker, endpoint, endpoint.handle)
        try:
            self.update_peer(name, metadata)
        except PeerGone:
            self.drop_peer(name, [])  # the caller learns no name for it
            raise
        return name

    def update_peer(self, peer: str, metadata: bytes) -> None:
        known = self._peers[peer]
        try:
            told = msgspec.msgpack.decode(metadata, type=_Metadata)
        except msgspec.MsgspecError as error:
            raise PeerGone(f"UCX does not take the peer's metadata: {error}") from error
        if told.worker != known.worker:
            raise PeerGone("the peer says that it is another one now")
        for address, length, rkey in told.regions[len(known.regions) :]:
            known.regions.append((address, length, self._ucp.unpack(known.handle, rkey)))

    def write(self, peer: str, *, source: Memory, target: Memory, copies: Sequence[Copy]) -> Transfer:
        reached = self._peers.get(peer)
        if reached is None or reached.is_closed:
            raise PeerGone("the channel broke with the peer")
        rkey = reached.rkey_of(target)
        reached.is_in_doubt = True
        for copy in copies:
            self._ucp.put(
                reached.handle,
                source.address + copy.source_offset,
                copy.length,
                target.address + copy.target_offset,
                rkey,
            )
        transfer = Transfer(next(self._numbers))
        self._flushes[transfer] = _Flush(self._ucp.flush(reached.handle), reached)
        reached.is_in_doubt = False
        return transfer

    def is_done(self, transfer: Transfer) -> bool:
        if not self._ucp.is_done(self._flushes[transfer].request):
            return False
        self._ucp.free(self._flushes.pop(transfer).request)
        return True

    def drop_peer(self, peer: str, transfers: Sequence[Transfer]) -> bool:
        gone = self._peers.get(peer)
        if gone is None:
            return True
        if not gone.is_closed:
            gone.is_closed = True
            with contextlib.suppress(self._ucxx.UCXError, RuntimeError):  # it may be dead already
                gone.endpoint.close_blocking(CLOSE_PERIOD_NS, CLOSE_ATTEMPTS)
        if not all(self._ucp.is_over(self._flushes[transfer].request) for transfer in transfers):
            return False  # what is under way uses its rkeys
        for _, _, rkey in gone.regions if not gone.is_in_doubt else ():
            self._ucp.forget(rkey)
        for transfer in transfers:
            self._ucp.free(self._flushes.pop(transfer).request)
        del self._peers[peer]
        return True

    def close(self) -> None:
        for name, peer in list(self._peers.items()):
            self.drop_peer(name, [transfer for transfer, flush in self._flushes.items() if flush.peer is peer])
        for handle in self._memories:
            self._ucp.unregister(handle)
        self._memories.clear()
        with contextlib.suppress(self._ucxx.UCXError, RuntimeError):
            self._worker.stop_progress_thread()
        self._worker = self._context = None


class _Metadata(msgspec.Struct, array_like=True, frozen=True):
    worker: bytes
    regions: list[tuple[int, int, bytes]]  # address, length, packed rkey


class _Peer:
    __slots__ = ("endpoint", "handle", "is_closed", "is_in_doubt", "regions", "worker")

    def __init__(self, worker: bytes, endpoint: Any, handle: int) -> None:
        self.worker = worker
        self.endpoint = endpoint
        self.handle = handle
        self.is_closed = False
        self.is_in_doubt = False  # a write failed: what of it is under way nobody can tell
        self.regions: list[tuple[int, int, int]] = []  # address, length, rkey

    def rkey_of(self, memory: Memory) -> int:
        for address, length, rkey in self.regions:
            if address <= memory.address and memory.address + memory.length <= address + length:
                return rkey
        raise PeerGone("the peer granted memory that it did not register")


class _Flush(NamedTuple):
    request: int  # 0: it ended at once
    peer: _Peer


class _MapParams(ctypes.Structure):
    """The start of ucp_mem_map_params_t."""

    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("rest", ctypes.c_uint64 * 4),
    ]


class _Ucp:
    """The calls of libucp for writing into a peer's memory. Raises PeerGone; ConfigError from register()."""

    ADDRESS_AND_LENGTH = 0b11
    IN_PROGRESS = 1
    ERROR_FROM = (1 << 64) - 100  # UCS_ERR_LAST: a "pointer" from there on is a negative status

    def __init__(self, context: int, worker: int) -> None:
        pointer, size, u64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
        library = ctypes.CDLL("libucp.so.0")
        self._context, self._worker = pointer(context), pointer(worker)
        # ucp_request_param_t with no field set: contiguous bytes, no callback.
        self._plain = ctypes.create_string_buffer(128)
        self._lib = library
        for name, result, arguments in (
            ("ucp_mem_map", ctypes.c_int8, [pointer, pointer, pointer]),
            ("ucp_mem_unmap", ctypes.c_int8, [pointer, pointer]),
            ("ucp_rkey_pack", ctypes.c_int8, [pointer, pointer, pointer, pointer]),
            ("ucp_rkey_buffer_release", None, [pointer]),
            ("ucp_ep_rkey_unpack", ctypes.c_int8, [pointer, ctypes.c_char_p, pointer]),
            ("ucp_rkey_destroy", None, [pointer]),
            ("ucp_put_nbx", u64, [pointer, pointer, size, u64, pointer, pointer]),
            ("ucp_ep_flush_nbx", u64, [pointer, pointer]),
            ("ucp_worker_progress", ctypes.c_uint, [pointer]),
            ("ucp_request_check_status", ctypes.c_int8, [pointer]),
            ("ucp_request_free", None, [pointer]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    def register(self, memory: Memory) -> tuple[int, bytes]:
        """UCX's handle and the packed rkey."""
        handle, packed, length = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
        params = _MapParams(self.ADDRESS_AND_LENGTH, memory.address, memory.length)
        status = self._lib.ucp_mem_map(self._context, ctypes.byref(params), ctypes.byref(handle))
        if status == 0:
            status = self._lib.ucp_rkey_pack(self._context, handle, ctypes.byref(packed), ctypes.byref(length))
        if status or not handle.value or not packed.value:
            raise ConfigError(f"UCX cannot register {memory.length} bytes of {memory.kind}: status {status}")
        rkey = ctypes.string_at(packed.value, length.value)
        self._lib.ucp_rkey_buffer_release(packed)
        return handle.value, rkey

    def unregister(self, handle: int) -> None:
        self._lib.ucp_mem_unmap(self._context, handle)

    def unpack(self, endpoint: int, packed: bytes) -> int:
        rkey = ctypes.c_void_p()
        status = self._lib.ucp_ep_rkey_unpack(endpoint, packed, ctypes.byref(rkey))
        if status or rkey.value is None:
            raise PeerGone(f"UCX does not take the peer's rkey: status {status}")
        return rkey.value

    def forget(self, rkey: int) -> None:
        self._lib.ucp_rkey_destroy(rkey)

    def put(self, endpoint: int, source: int, length: int, target: int, rkey: int) -> None:
        """Its end is that of the next flush."""
        self.free(self._checked(self._lib.ucp_put_nbx(endpoint, source, length, target, rkey, self._plain)))

    def flush(self, endpoint: int) -> int:
        """A request that ends when everything put before is in the peer's memory; 0 if it is already."""
        return self._checked(self._lib.ucp_ep_flush_nbx(endpoint, self._plain))

    def is_done(self, request: int) -> bool:
        if not request:
            return True
        for _ in range(PROGRESS_ROUNDS):
            if not self._lib.ucp_worker_progress(self._worker):
                break
        status = self._lib.ucp_request_check_status(request)
        if status < 0:
            raise PeerGone(f"UCX: the peer is gone (status {status})")
        return bool(status != self.IN_PROGRESS)

    def is_over(self, request: int) -> bool:
        """Done, or failed."""
        try:
            return self.is_done(request)
        except PeerGone:
            return True

    def free(self, request: int) -> None:
        """A request under way is forgotten, not cancelled."""
        if request:
            self._lib.ucp_request_free(request)

    def _checked(self, request: int) -> int:
        if request >= self.ERROR_FROM:
            raise PeerGone(f"UCX: the peer is gone (status {request - (1 << 64)})")
        return request
