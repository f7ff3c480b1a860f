"""TLS 1.3 for the tcp lane: both sides show a certificate of one authority. Knows files and sockets, no frames.

It encrypts what the cluster key has only authenticated; the key's proof is still asked for, inside. Names in
certificates are not looked at: peers are addresses that signed handles bring, and the authority is the cluster's own.

Records are made and opened in memory, and travel by the quarter MiB: an SSLSocket would need several system calls, and
at the other end a wake-up, for every 16 KiB.
"""

from __future__ import annotations

import math
import socket
import ssl
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pdx.config import Config
from pdx.errors import ConfigError, PeerGone, WireError

TRAVEL_BYTES = 256 << 10


class TlsFiles(msgspec.Struct, frozen=True):
    """PEM files: this host's certificate and its private key, and the authority that signed everybody's."""

    certificate: Path
    key: Path
    authority: Path


class LaneTls:
    """Immutable, and so for all threads."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError for files that are absent or do not fit together, and for a key that others can read."""
        _check_private(files.key)
        self._as_connector = _context(files, ssl.PROTOCOL_TLS_CLIENT)
        self._as_acceptor = _context(files, ssl.PROTOCOL_TLS_SERVER)
        # Without tickets an acceptor says nothing after the greeting, as without TLS; connections are long-lived.
        self._as_acceptor.num_tickets = 0

    def pipe(self, connection: socket.socket, *, is_acceptor: bool) -> TlsPipe:
        """Nothing travels until shake_hands(). The connection stays its owner's to tune, shut and close."""
        return TlsPipe(connection, self._as_acceptor if is_acceptor else self._as_connector, is_acceptor=is_acceptor)


def lane_tls(settings: Config) -> LaneTls | None:
    """What a daemon's lanes get; None without TLS. Raises as LaneTls does."""
    if not settings.tls_cert:
        return None
    return LaneTls(TlsFiles(Path(settings.tls_cert), Path(settings.tls_key), Path(settings.tls_ca)))


class TlsPipe:
    """The bytes of a tuned connection, encrypted. It belongs to the one thread that sends or receives through it."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, is_acceptor: bool) -> None:
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_acceptor)
        self._raw = memoryview(bytearray(TRAVEL_BYTES))
        self._stall_s = math.inf  # before the greeting nothing is received

    def shake_hands(self, stall_s: float) -> None:
        """Raises WireError unless the peer is one of ours; WireError or OSError within twice `stall_s`."""
        self._stall_s = stall_s
        deadline_s = time.monotonic() + stall_s  # for the whole of it, however its bytes drip
        try:
            while not self._is_greeted():
                if time.monotonic() > deadline_s or not self._fill():
                    raise WireError("the peer did not finish its TLS handshake")
            self._flush()
        except (ssl.SSLError, BlockingIOError) as error:
            self._flush()  # the alert tells its operator why
            raise WireError(f"the peer does not speak TLS 1.3 with a certificate of our authority: {error}") from error

    def sendall(self, data: bytes | memoryview) -> None:
        self.send([data])

    def send(self, buffers: Iterable[bytes | memoryview], deadline_s: float = math.inf) -> None:
        """Raises BlockingIOError if the peer takes nothing for the connection's stall time, or has not taken all by the
        deadline; OSError if the connection breaks."""
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                rest = rest[self._tls.write(rest) :]  # a record
                if self._outgoing.pending >= TRAVEL_BYTES:
                    self._flush(deadline_s)
        self._flush(deadline_s)

    def recv_into(self, buffer: memoryview) -> int:
        """Up to a record; 0 at the end of the stream.

        Raises BlockingIOError if there is none within the stall time, however its bytes drip, PeerGone and OSError.
        """
        deadline_s = time.monotonic() + self._stall_s
        while True:
            try:
                return self._tls.read(len(buffer), buffer)  # type: ignore[return-value]  # how many
            except ssl.SSLWantReadError as error:
                if time.monotonic() > deadline_s:
                    raise BlockingIOError("no whole record within the stall time") from error
                if not self._fill():
                    return 0
            except ssl.SSLError as error:
                raise PeerGone(f"TLS: {error}") from error

    def _is_greeted(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        return True

    def _fill(self) -> bool:
        """False at the end of the stream."""
        received_bytes = self._connection.recv_into(self._raw)
        self._incoming.write(self._raw[:received_bytes])
        return received_bytes > 0

    def _flush(self, deadline_s: float = math.inf) -> None:
        rest = memoryview(self._outgoing.read())
        while rest:
            if time.monotonic() >= deadline_s:
                raise BlockingIOError("not all within its time")
            rest = rest[self._connection.send(rest) :]


def _check_private(key: Path) -> None:
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"TLS key {key}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"TLS key {key} is readable by others: chmod 600 {key}")


def _context(files: TlsFiles, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(files.authority)
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"TLS of {files.certificate}, {files.key} and {files.authority}: {error}") from error
    return context
