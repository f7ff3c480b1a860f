"""Messages: golden bytes, an independent reader, refusal of anything else."""

from __future__ import annotations

import os
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_samples import SAMPLES, name_of

from pdx import wire
from pdx.errors import VersionMismatch, WireError

GOLDEN = Path(__file__).parent / "golden" / "wire"
EVERY = tuple(dict.fromkeys(type(sample) for sample in SAMPLES))
ids = [name_of(sample) for sample in SAMPLES]


def _union() -> object:
    union = EVERY[0]
    for kind in EVERY[1:]:
        union = union | kind
    return union


decode_any = wire.decoder_of(_union())


def test_samples_cover_every_message() -> None:
    def leaves(kind: type) -> set[type]:
        children = kind.__subclasses__()
        return {kind} if not children else set().union(*(leaves(child) for child in children))

    assert leaves(wire.Message) - {wire.Message} == set(EVERY)


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_golden_bytes(sample: wire.Message) -> None:
    """If this fails on purpose: raise WIRE_VERSION, then run with UPDATE_GOLDEN=1."""
    path = GOLDEN / f"{name_of(sample)}.v{wire.WIRE_VERSION}.bin"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(wire.encode(sample))
    assert wire.encode(sample) == path.read_bytes()


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_round_trip_and_independent_reader(sample: wire.Message) -> None:
    frame = wire.encode(sample)
    assert decode_any(frame) == sample
    body = msgpack.unpackb(frame[4:])
    assert body["type"] == sample.__struct_config__.tag
    assert set(body) - {"type"} == {field.encode_name for field in msgspec.structs.fields(sample)}


def test_other_version_is_refused_before_the_body() -> None:
    with pytest.raises(VersionMismatch, match="version 9"):
        decode_any(b"PDX\x09" + b"\xc1 not msgpack")


def test_unknown_fields_and_foreign_conversations_are_refused() -> None:
    ids = {"handoff_id": b"", "attempt": 1, "lease_epoch": 1, "incarnation": 1}
    body = msgpack.packb({"type": "committed", **ids, "x": 1})
    with pytest.raises(WireError):
        decode_any(wire.MAGIC + bytes([wire.WIRE_VERSION]) + body)
    with pytest.raises(WireError):
        wire.decoder_of(wire.ENGINE)(wire.encode(wire.Wait(**ids, ahead=1)))


def test_oversized_frames_are_refused_unread() -> None:
    with pytest.raises(WireError, match="over the limit"):
        decode_any(bytes(wire.FRAME_BYTES_MAX + 1))


def test_a_window_is_a_number_that_a_lane_can_name() -> None:
    """Any other would cost all puts of its channel."""
    grant = next(sample for sample in SAMPLES if isinstance(sample, wire.Grant))
    for window in (0, (1 << 64) - 1):
        decode_any(wire.encode(msgspec.structs.replace(grant, window=window)))
    with pytest.raises(WireError):
        decode_any(wire.encode(msgspec.structs.replace(grant, window=-1)))


def test_reasons_of_other_machines_are_bounded() -> None:
    """They are kept for long, and forwarded with more before them, in a frame that has a limit too."""
    told = [sample for sample in SAMPLES if isinstance(sample, wire.Refuse | wire.Fail | wire.Cancel)]
    told += [sample for sample in SAMPLES if isinstance(sample, wire.HandoffFailed | wire.CancelHandoff)]
    for sample in told:
        usual = msgspec.structs.replace(sample, reason="é" * 4 * wire.REASON_CHARS_MAX)
        assert decode_any(wire.encode(usual)) == usual
        with pytest.raises(WireError):
            decode_any(wire.encode(msgspec.structs.replace(usual, reason=usual.reason + "x")))
    assert len(told) == 5


@given(st.binary(max_size=300))
def test_garbage_raises_wire_error_only(garbage: bytes) -> None:
    for frame in (garbage, wire.MAGIC + bytes([wire.WIRE_VERSION]) + garbage):
        try:
            decode_any(frame)
        except WireError:
            pass


@given(st.sampled_from(SAMPLES), st.data())
def test_flipped_bytes_raise_wire_error_or_decode(sample: wire.Message, data: st.DataObject) -> None:
    frame = bytearray(wire.encode(sample))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        decode_any(bytes(frame))
    except WireError:
        pass
