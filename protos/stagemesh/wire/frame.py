"""TransferRequest frames without a copy through protobuf.

`data` is the last field of the message, so a frame is the serialized header, the tag and length of
`data`, and the payload. What `encode` returns is a valid TransferRequest and any peer can parse it;
`decode` reads what any protobuf library serializes in field order, and falls back to a full parse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import InvalidArgumentError

_DATA_TAG = bytes([stage_pb2.TransferRequest.DATA_FIELD_NUMBER << 3 | 2])
MAX_FRAME_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; `data` is a view into the message it came in."""

    epoch: int
    kind: int
    step: int
    total_bytes: int
    offset: int
    data: memoryview

    @property
    def last(self) -> bool:
        """Whether the tensor is complete with it."""
        return self.offset + len(self.data) >= self.total_bytes


def encode(*, epoch: int, kind: int, step: int, tensor: memoryview) -> Iterator[bytes]:
    """The frames of a tensor's bytes (flat, `B` format), in order; an empty tensor is one frame."""
    for offset in range(0, max(len(tensor), 1), MAX_FRAME_BYTES):
        data = tensor[offset : offset + MAX_FRAME_BYTES]
        header = stage_pb2.TransferRequest(
            epoch=epoch,
            kind=kind,  # type: ignore[arg-type]
            step=step,
            total_bytes=len(tensor),
            offset=offset,
        )
        yield b"".join((header.SerializeToString(), _DATA_TAG, _varint(len(data)), data))


def decode(message: bytes | memoryview) -> Frame:
    """The frame in a serialized TransferRequest; `data` stays where it is."""
    view = memoryview(message)
    split = _find_data(view)
    header = stage_pb2.TransferRequest()
    try:
        header.ParseFromString(bytes(view[: split[0]]) if split else bytes(view))
    except DecodeError as error:
        raise InvalidArgumentError(
            f"a message of {len(view)} bytes does not parse as stagemesh.v1.TransferRequest",
            reason="UNPARSABLE",
        ) from error
    data = view[split[1] :] if split else memoryview(header.data)
    frame = Frame(header.epoch, header.kind, header.step, header.total_bytes, header.offset, data)
    if frame.offset + len(data) > frame.total_bytes:
        raise InvalidArgumentError(
            f"data ends at byte {frame.offset + len(data)} of a tensor of {frame.total_bytes}",
            field="data",
            reason="BAD_FRAME",
        )
    return frame


def _find_data(view: memoryview) -> tuple[int, int] | None:
    """Where the header ends and where the payload starts, if `data` is the last field of the message."""
    position, end = 0, len(view)
    while position < end:
        tag = view[position]
        if tag == _DATA_TAG[0]:
            start, length = _read_varint(view, position + 1)
            return (position, start) if start + length == end else None
        if tag & 7:  # the header has varint fields only
            return None
        position, _ = _read_varint(view, position + 1)
    return None


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view):
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return position, value
        shift += 7
    return position, 1 << 63  # cut off: no length fits, the full parse will say so


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
