"""Two hosts on one machine: network namespaces joined by a wire of any speed, and a management network beside it.

Owns namespaces, interfaces and shaping; knows nothing of what runs in them. KV travels on the wire, which `tc tbf`
slows down at its sending end (acknowledgements return free); clients, routers and engines' HTTP use the management
bridge, which is not slowed, so that a measured delay is the wire's. Needs root, and `ip` and `tc`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.harness.leaving import leaving
from pdx.errors import ConfigError

# Segments leave as skbs of up to GSO bytes, and a token bucket must hold at least one. A bucket is also what an idle
# link sends for nothing, so it is kept small: 32 KiB are a third of one page of the demo model, 0.3 ms at 830 Mbit/s.
GSO_BYTES = 16 << 10
BURST_BYTES = 32 << 10
QUEUE_MS = 50  # what may wait in the bucket's queue; TCP itself keeps far less there
# Ethernet, IP and TCP headers of a full segment of 1,500 bytes, timestamps on: what tbf counts, and what is payload.
PAYLOAD_SHARE = 1448 / 1514
WIRE_DEVICE = "wire"  # its name in both namespaces
GOODPUT_BYTES_MAX = 64 << 20
GOODPUT_S = 30.0
CLONE_NEWNET = 0x40000000

T = TypeVar("T")


@dataclass(frozen=True)
class Host:
    """One namespace. `prefix` before a command line runs it there."""

    name: str
    wire: str  # its address on the shaped link
    management: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)


class Wire:
    """Two hosts and what joins them, from entering to leaving the context. `outside`: our own management address."""

    def __init__(self) -> None:
        number = os.getpid()
        subnet = f"198.18.{number % 250}"  # of the range that is reserved for benchmarks
        self._tag = f"pdx{number}"  # interface names have 15 characters at most
        self.outside = f"{subnet}.254"
        self.source = Host(f"{self._tag}-source", "198.19.255.1", f"{subnet}.1")
        self.target = Host(f"{self._tag}-target", "198.19.255.2", f"{subnet}.2")
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Wire:
        _check_able()
        with contextlib.ExitStack() as undo:
            undo.enter_context(leaving())
            bridge = f"{self._tag}br"
            self._make(undo, f"link add {bridge} type bridge", f"link del {bridge}")
            _run("ip", f"addr add {self.outside}/24 dev {bridge}")
            _run("ip", f"link set {bridge} up")
            for host in (self.source, self.target):
                self._make(undo, f"netns add {host.name}", f"netns del {host.name}")
                _run("ip", f"-n {host.name} link set lo up")
            self._manage(undo, self.source, bridge, f"{self._tag}a")
            self._manage(undo, self.target, bridge, f"{self._tag}b")
            one, other = (f"name {WIRE_DEVICE} netns {host.name}" for host in (self.source, self.target))
            _run("ip", f"link add {one} type veth peer {other}")  # it ends with its namespaces
            for host in (self.source, self.target):
                _run("ip", f"-n {host.name} link set {WIRE_DEVICE} gso_max_size {GSO_BYTES} gso_max_segs 64")
                _run("ip", f"-n {host.name} addr add {host.wire}/30 dev {WIRE_DEVICE}")
                _run("ip", f"-n {host.name} link set {WIRE_DEVICE} up")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def shape(self, goodput_bytes_per_s: float) -> float:
        """Slows what the source host sends so that a TCP stream carries so much. Returns the line rate, in bit/s."""
        line_bits_per_s = goodput_bytes_per_s * 8 / PAYLOAD_SHARE
        bucket = f"rate {line_bits_per_s:.0f}bit burst {BURST_BYTES} latency {QUEUE_MS}ms"
        _run("tc", f"-n {self.source.name} qdisc replace dev {WIRE_DEVICE} root tbf {bucket}")
        return line_bits_per_s

    def unshape(self) -> None:
        with contextlib.suppress(ConfigError):  # it has no shape
            _run("tc", f"-n {self.source.name} qdisc del dev {WIRE_DEVICE} root")

    def goodput(self, *, seconds: float = 2.0) -> float:
        """Payload bytes per second that one TCP stream gets through the wire now, its first tenth left out."""
        with (
            inside(self.target, lambda: socket.create_server((self.target.wire, 0))) as listener,
            inside(self.source, lambda: socket.create_connection(listener.getsockname(), GOODPUT_S)) as sender,
        ):
            receiver, _ = listener.accept()
            with receiver:
                receiver.settimeout(GOODPUT_S)
                thread = threading.Thread(target=_pour, args=(sender, seconds))
                thread.start()
                try:
                    return _drain(receiver, warm_s=seconds / 10)
                finally:
                    thread.join(GOODPUT_S)

    def _manage(self, undo: contextlib.ExitStack, host: Host, bridge: str, port: str) -> None:
        self._make(undo, f"link add {port} type veth peer name manage netns {host.name}", f"link del {port}")
        _run("ip", f"link set {port} master {bridge} up")
        _run("ip", f"-n {host.name} addr add {host.management}/24 dev manage")
        _run("ip", f"-n {host.name} link set manage up")

    def _make(self, undo: contextlib.ExitStack, make: str, unmake: str) -> None:
        _run("ip", make)
        undo.callback(_run, "ip", unmake)


def inside(host: Host, make: Callable[[], T]) -> T:
    """Calls `make` in a host's network: a socket made there stays there, whoever uses it. Raises what `make` raises."""
    made: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:  # a namespace is entered by a thread, and this one ends before it could do anything else in it
        try:
            with open(f"/run/netns/{host.name}", "rb") as namespace:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the network of {host.name}")
            made.append(make())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def why_not() -> str:
    """Why no namespaces can be made here; empty if they can."""
    if os.geteuid():
        return "network namespaces need root: run this with sudo"
    for program in ("ip", "tc"):
        if not shutil.which(program):
            return f"`{program}` is missing: install the Debian package iproute2"
    return ""


def _check_able() -> None:
    if reason := why_not():
        raise ConfigError(reason)


def _run(program: str, arguments: str) -> None:
    done = subprocess.run([program, *arguments.split()], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise ConfigError(f"{program} {arguments}: {done.stderr.strip() or done.returncode}")


def _pour(sender: socket.socket, seconds: float) -> None:
    """Sends for so long, then ends the stream."""
    sender.settimeout(GOODPUT_S)
    block, end = bytes(64 << 10), time.monotonic() + seconds
    for _ in range(GOODPUT_BYTES_MAX * 64 // len(block)):
        if time.monotonic() > end:
            break
        sender.sendall(block)
    sender.shutdown(socket.SHUT_WR)


def _drain(receiver: socket.socket, *, warm_s: float) -> float:
    buffer = bytearray(256 << 10)
    started, counted_bytes, counting_since = time.monotonic(), 0, 0.0
    now = started
    while got_bytes := receiver.recv_into(buffer):
        now = time.monotonic()
        if counting_since:
            counted_bytes += got_bytes
        elif now - started > warm_s:
            counting_since = now
    return counted_bytes / (now - counting_since) if counting_since and now > counting_since else 0.0
