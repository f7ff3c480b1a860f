"""How two lanes make sure of each other before anything else is said. Knows keys and nonces, no puts.

HELLO and CHALLENGE exchange versions, whether each side has a key, and nonces; then, if keyed, first the connector
and then the acceptor prove the cluster key over both nonces. Roles are part of what is signed, so that no proof can
be reflected. The connection itself is neither encrypted nor signed afterwards: that is the network's business.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from pdx.errors import PeerGone, WireError
from pdx.transport.frames import (
    CHALLENGE,
    GREETING_BYTES,
    HELLO,
    NONCE_BYTES,
    PROOF,
    Greeting,
    decode_greeting,
    encode_greeting,
)
from pdx.transport.sockets import Pipe, receive_exactly


def greet_as_connector(connection: Pipe, key: bytes | None) -> None:
    """Returns once the acceptor is one of us. Raises WireError, PeerGone or OSError."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        _send(connection, Greeting(HELLO, key is not None, nonce))
        challenge = _receive(connection, CHALLENGE)
    except ConnectionError as error:
        raise PeerGone(f"the peer hung up before a word: it may be ending, or have too many peers ({error})") from error
    _check_same(key, challenge)
    if key is not None:
        _send(connection, Greeting(PROOF, True, proof(key, "connector", nonce, challenge.secret)))
        try:
            answer = _receive(connection, PROOF)
        except PeerGone as error:
            raise WireError("the peer refused our proof: give both the same key file") from error
        _check_proof(answer, proof(key, "acceptor", nonce, challenge.secret))


def greet_as_acceptor(connection: Pipe, key: bytes | None) -> None:
    """Returns once the connector is one of us. Raises WireError, PeerGone or OSError.

    The challenge goes out before the hello is judged: so that a peer of another version or without a key can tell its
    operator why it was turned away.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    raw_hello = _receive_raw(connection)
    _send(connection, Greeting(CHALLENGE, key is not None, nonce))
    hello = decode_greeting(raw_hello, kind=HELLO)
    _check_same(key, hello)
    if key is not None:
        _check_proof(_receive(connection, PROOF), proof(key, "connector", hello.secret, nonce))
        _send(connection, Greeting(PROOF, True, proof(key, "acceptor", hello.secret, nonce)))


def proof(key: bytes, role: str, connector_nonce: bytes, acceptor_nonce: bytes) -> bytes:
    message = b"pdx-lane-1 " + role.encode() + b" " + connector_nonce + acceptor_nonce
    return hmac.new(key, message, hashlib.sha256).digest()


def _check_same(key: bytes | None, greeting: Greeting) -> None:
    if greeting.is_keyed != (key is not None):
        ours, theirs = ("a", "none") if key is not None else ("no", "one")
        raise WireError(f"this lane has {ours} cluster key and the peer has {theirs}: give both the same key file")


def _check_proof(greeting: Greeting, expected: bytes) -> None:
    if not hmac.compare_digest(greeting.secret, expected):
        raise WireError("the peer has another cluster key: give both the same key file")


def _send(connection: Pipe, greeting: Greeting) -> None:
    connection.sendall(encode_greeting(greeting))


def _receive(connection: Pipe, kind: int) -> Greeting:
    return decode_greeting(_receive_raw(connection), kind=kind)


def _receive_raw(connection: Pipe) -> bytes:
    raw = bytearray(GREETING_BYTES)
    receive_exactly(connection, [memoryview(raw)], GREETING_BYTES)
    return bytes(raw)
