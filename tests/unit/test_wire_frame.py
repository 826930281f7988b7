"""TransferRequest frames: what is put together is what comes apart, with or without protobuf."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.v1 import stage_pb2
from stagemesh.wire import frame
from stagemesh.wire.errors import InvalidArgumentError

U64 = st.integers(0, 2**64 - 1)
KINDS = st.sampled_from([stage_pb2.LINK_KIND_ACTIVATIONS, stage_pb2.LINK_KIND_RING])


@given(epoch=U64, kind=KINDS, step=U64, data=st.binary(max_size=400))
def test_a_frame_goes_round_and_is_a_message_of_the_contract(
    epoch: int, kind: int, step: int, data: bytes
) -> None:
    (message,) = frame.encode(epoch=epoch, kind=kind, step=step, tensor=memoryview(data))
    parsed = stage_pb2.TransferRequest.FromString(message)
    assert (parsed.epoch, parsed.kind, parsed.step, parsed.data) == (epoch, kind, step, data)
    part = frame.decode(message)
    assert (part.epoch, part.kind, part.step, part.offset) == (epoch, kind, step, 0)
    assert part.total_bytes == len(data)
    assert bytes(part.data) == data
    assert part.last


@given(epoch=U64, step=U64, total=st.integers(0, 2**40), data=st.binary(max_size=300))
def test_what_any_protobuf_library_writes_is_read(epoch: int, step: int, total: int, data: bytes) -> None:
    message = stage_pb2.TransferRequest(epoch=epoch, step=step, total_bytes=total + len(data), data=data)
    part = frame.decode(message.SerializeToString())
    assert (part.epoch, part.step, bytes(part.data)) == (epoch, step, data)
    assert part.last == (len(data) >= part.total_bytes)


def test_fields_in_another_order_are_read() -> None:
    head = stage_pb2.TransferRequest(epoch=3, total_bytes=2).SerializeToString()
    data = stage_pb2.TransferRequest(data=b"xy").SerializeToString()
    part = frame.decode(data + head)
    assert (part.epoch, bytes(part.data)) == (3, b"xy")


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_large_tensor_is_cut_and_comes_together(count: int, extra: int) -> None:
    tensor = bytes(range(256)) * (frame.MAX_FRAME_BYTES // 256 * count) + b"\7" * max(extra, 0)
    tensor = tensor[: len(tensor) + min(extra, 0)]
    parts = [
        frame.decode(message)
        for message in frame.encode(epoch=1, kind=stage_pb2.LINK_KIND_RING, step=9, tensor=memoryview(tensor))
    ]
    assert len(parts) == count + (extra > 0)
    assert all(len(part.data) <= frame.MAX_FRAME_BYTES for part in parts)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert b"".join(bytes(part.data) for part in parts) == tensor
    offsets = [part.offset for part in parts]
    assert offsets == [index * frame.MAX_FRAME_BYTES for index in range(len(parts))]


def test_the_payload_is_not_copied() -> None:
    (message,) = frame.encode(epoch=1, kind=stage_pb2.LINK_KIND_RING, step=1, tensor=memoryview(b"abc" * 50))
    buffer = bytearray(message)
    part = frame.decode(memoryview(buffer))
    buffer[-1] = ord("!")
    assert bytes(part.data[-1:]) == b"!"


@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    try:
        part = frame.decode(data)
    except InvalidArgumentError:
        return
    assert part.offset + len(part.data) <= part.total_bytes


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_frame_cut_short_is_refused(data: bytes, draw: st.DataObject) -> None:
    (message,) = frame.encode(epoch=7, kind=stage_pb2.LINK_KIND_RING, step=300, tensor=memoryview(data))
    length = draw.draw(st.integers(len(message) - len(data), len(message) - 1))
    with pytest.raises(InvalidArgumentError):
        frame.decode(message[:length])


def test_data_past_the_end_of_the_tensor_is_refused() -> None:
    message = stage_pb2.TransferRequest(total_bytes=10, offset=8, data=b"abc").SerializeToString()
    with pytest.raises(InvalidArgumentError) as refused:
        frame.decode(message)
    assert (refused.value.reason, refused.value.field) == ("BAD_FRAME", "data")
