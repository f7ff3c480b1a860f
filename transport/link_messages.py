"""What two one-sided lanes say to each other beside the bytes they write, and how it is framed. Pure; no sockets.

A window's rights travel here, from lane to lane: its sender asks before the first put, and says when it has drained.

    ASK      sender -> receiver    may I write through this window?
    GRANTED  receiver -> sender    yes: these spans of this memory, with what the fabric needs to reach it
    UNKNOWN  receiver -> sender    no such window (any more)
    LANDED   sender -> receiver    all bytes of one put are there; its notice
    SHUT     receiver -> sender    post nothing more through this window
    DRAINED  sender -> receiver    nothing is under way through it, nor will be
    BYE      sender -> receiver    nothing at all is under way: the end of this connection is an orderly one

Every message is its length (4 bytes, little-endian) and a MessagePack array. A decoder takes bytes from anybody,
buffers little more than one message, and raises WireError and nothing else.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec

from pdx.errors import WireError
from pdx.transport.api import Span
from pdx.transport.frames import NOTICE_BYTES_MAX

# A prompt of a million tokens in chunks of 256 has 4,096 slots, each of them one span in every grant.
SPANS_IN_WINDOW_MAX = 32_768
# 32,768 spans of up to 19 bytes; agents' metadata was seen at 0.5 KB a region; a notice is 64 KiB.
MESSAGE_BYTES_MAX = 1 << 20
METADATA_BYTES_MAX = 128 << 10

_LENGTH = struct.Struct("<I")

U64 = Annotated[int, msgspec.Meta(ge=0)]


class Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    window: U64


class Granted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    window: U64
    address: U64
    length: U64
    kind: Literal["DRAM", "VRAM"]
    device: U64
    spans: Annotated[list[Span], msgspec.Meta(max_length=SPANS_IN_WINDOW_MAX)]
    metadata: Annotated[bytes, msgspec.Meta(max_length=METADATA_BYTES_MAX)]  # empty: as before


class Unknown(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    window: U64


class Landed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    window: U64
    notice: Annotated[bytes, msgspec.Meta(max_length=NOTICE_BYTES_MAX)]


class Shut(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    window: U64


class Drained(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=6):
    window: U64


class Bye(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=7):
    pass


LinkMessage = Ask | Granted | Unknown | Landed | Shut | Drained | Bye

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LinkMessage)


def encode(message: LinkMessage) -> bytes:
    body = _encoder.encode(message)
    assert len(body) <= MESSAGE_BYTES_MAX
    return _LENGTH.pack(len(body)) + body


class MessageStream:
    """Bytes in, whole messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[LinkMessage]:
        """Raises WireError; the stream is of no use afterwards."""
        self._buffer += data
        messages: list[LinkMessage] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if not 0 < length <= MESSAGE_BYTES_MAX:
                raise WireError(f"a message of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                messages.append(_decoder.decode(memoryview(self._buffer)[start + _LENGTH.size : end]))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise WireError(f"a message that is none: {error}") from error
            start = end
        del self._buffer[:start]
        return messages
