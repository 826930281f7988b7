"""Spans as OTLP bytes, many at a time. Needs numpy.

A span object of the SDK costs 30 to 60 µs from start to export (docs/observability.md has the measurement); a traced
step has some twenty. Spans of one kind differ only in fields of a fixed size: ids, times, numbers. So their bytes
are laid out once, and a batch is that row repeated, with columns of it overwritten: below a microsecond a span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

INTERNAL, SERVER = 1, 2
"""Kinds of a span on the wire; the client's spans are the SDK's."""

_VARINT_BYTES = 8
"""Of an integer attribute: padded, so that every value has the same size; up to 56 bits."""
_LINK_BYTES = 28
LINK_ROW = 2 + _LINK_BYTES
"""Bytes of one link as a field of a span."""

AttributeValue = str | int | float | bool | Sequence[str]


class SpanTemplate:
    """The bytes of a span, with places for what differs.

    Args:
        name: Of the span.
        attributes: The same on each of them.
        columns: Keys of attributes that differ, with the type of their value.
        kind: INTERNAL or SERVER.
        root: Whether they have no parent.
    """

    def __init__(
        self,
        name: str,
        *,
        attributes: Mapping[str, AttributeValue] | None = None,
        columns: Mapping[str, Literal["int", "float"]] | None = None,
        kind: int = INTERNAL,
        root: bool = False,
    ) -> None:
        body = bytearray()
        self._offsets: dict[str, int] = {}

        def place(key: str, tag: bytes, size: int) -> None:
            body.extend(tag)
            self._offsets[key] = len(body)
            body.extend(bytes(size))

        place("trace_id", b"\x0a\x10", 16)
        place("span_id", b"\x12\x08", 8)
        if not root:
            place("parent_id", b"\x22\x08", 8)
        body += _text(5, name)
        body += b"\x30" + bytes([kind])
        place("start", b"\x39", 8)
        place("end", b"\x41", 8)
        for key, value in (attributes or {}).items():
            body += attribute(key, value)
        self._columns = dict(columns or {})
        for key, type_ in self._columns.items():
            size = _VARINT_BYTES if type_ == "int" else 8
            value_tag = b"\x18" if type_ == "int" else b"\x21"
            head = _text(1, key) + b"\x12" + varint(1 + size) + value_tag
            body += b"\x4a" + varint(len(head) + size) + head[:-1]
            place(key, head[-1:], size)
        self._root = root
        self._body = bytes(body)

    def encode(
        self,
        *,
        trace_ids: Bytes,
        span_ids: Bytes,
        starts_ns: Int64,
        ends_ns: Int64,
        parent_ids: Bytes | None = None,
        links: Sequence[bytes] | None = None,
        columns: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> bytes:
        """The spans as fields of a ScopeSpans.

        Args:
            trace_ids: [N, 16].
            span_ids: [N, 8].
            starts_ns: [N] nanoseconds of the wall clock.
            ends_ns: [N] the same.
            parent_ids: [N, 8]; not for roots.
            links: The links of each span, as `link_rows` makes them.
            columns: [N] values of every key given to the constructor.
        """
        count = len(span_ids)
        if not count:
            return b""
        rows = np.tile(np.frombuffer(self._body, np.uint8), (count, 1))

        def put(key: str, values: Bytes) -> None:
            rows[:, self._offsets[key] : self._offsets[key] + values.shape[1]] = values

        put("trace_id", trace_ids)
        put("span_id", span_ids)
        if not self._root:
            assert parent_ids is not None
            put("parent_id", parent_ids)
        put("start", _fixed(starts_ns, "<i8"))
        put("end", _fixed(ends_ns, "<i8"))
        for key, type_ in self._columns.items():
            values = (columns or {})[key]
            put(key, _varints(values) if type_ == "int" else _fixed(values, "<f8"))
        if links is None:
            head = np.frombuffer(b"\x12" + varint(rows.shape[1]), np.uint8)
            return np.hstack((np.tile(head, (count, 1)), rows)).tobytes()
        parts: list[bytes] = []
        for row, linked in zip(rows, links, strict=True):
            parts += (b"\x12" + varint(len(row) + len(linked)), row.tobytes(), linked)
        return b"".join(parts)


def attribute(key: str, value: AttributeValue) -> bytes:
    """A KeyValue as field `attributes` of a span."""
    if isinstance(value, bool):
        any_value = b"\x10" + (b"\x01" if value else b"\x00")
    elif isinstance(value, int):
        any_value = b"\x18" + varint(value & (1 << 64) - 1)
    elif isinstance(value, float):
        any_value = b"\x21" + np.float64(value).tobytes()
    elif isinstance(value, str):
        any_value = _text(1, value)
    else:
        items = b"".join(b"\x0a" + varint(len(item)) + item for item in (_text(1, text) for text in value))
        any_value = b"\x2a" + varint(len(items)) + items
    entry = _text(1, key) + b"\x12" + varint(len(any_value)) + any_value
    return b"\x4a" + varint(len(entry)) + entry


def one_span(
    name: str,
    *,
    trace_id: bytes,
    span_id: bytes,
    parent_id: bytes,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue],
    kind: int = INTERNAL,
    error: str | None = None,
) -> bytes:
    """A span of its own as a field of a ScopeSpans; `error` is the message of a failure, None for none."""
    body = b"\x0a\x10" + trace_id + b"\x12\x08" + span_id
    if any(parent_id):
        body += b"\x22\x08" + parent_id
    body += _text(5, name) + b"\x30" + bytes([kind])
    body += b"\x39" + start_ns.to_bytes(8, "little") + b"\x41" + end_ns.to_bytes(8, "little")
    body += b"".join(attribute(key, value) for key, value in attributes.items())
    if error is not None:
        status = _text(2, error) + b"\x18\x02"
        body += b"\x7a" + varint(len(status)) + status
    return b"\x12" + varint(len(body)) + body


def link_rows(contexts: Bytes) -> Bytes:
    """[N, 24] trace and span ids as [N, LINK_ROW] links."""
    rows = np.empty((len(contexts), LINK_ROW), np.uint8)
    rows[:, :4] = (0x6A, _LINK_BYTES, 0x0A, 16)
    rows[:, 4:20] = contexts[:, :16]
    rows[:, 20:22] = (0x12, 8)
    rows[:, 22:] = contexts[:, 16:]
    return rows


def ids(data: bytes, size: int) -> Bytes:
    """[N, size] ids that lie back to back."""
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def _text(field: int, text: str) -> bytes:
    data = text.encode()
    return bytes([field << 3 | 2]) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """A non-negative integer as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints(values: npt.NDArray[Any]) -> Bytes:
    """[N, _VARINT_BYTES]: a varint may be longer than it need be."""
    shifts = np.arange(_VARINT_BYTES, dtype=np.uint64) * np.uint64(7)
    digits = (values.astype(np.uint64)[:, None] >> shifts) & np.uint64(0x7F)
    digits[:, :-1] |= np.uint64(0x80)
    return digits.astype(np.uint8)


def _fixed(values: npt.NDArray[Any], dtype: str) -> Bytes:
    return np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(len(values), 8)
