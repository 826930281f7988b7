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
"""Of an integer attribute: padded, so that every value has the same size; 0 to 2**56 - 1."""
_TRACE_ID, _SPAN_ID = ("u1", (16,)), ("u1", (8,))
_VALUES: dict[str, tuple[bytes, Any]] = {
    "int": (b"\x18", ("u1", (_VARINT_BYTES,))),
    "float": (b"\x21", "<f8"),
}
"""Tag and type of an attribute's value."""
_LINK_BYTES = 28
_LINK_HEAD = bytes((0x6A, _LINK_BYTES, 0x0A, 16))
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
        root: Whether they have no parent, or some have: those get theirs as a tail.
        linked: Whether each has one link.
    """

    def __init__(
        self,
        name: str,
        *,
        attributes: Mapping[str, AttributeValue] | None = None,
        columns: Mapping[str, Literal["int", "float"]] | None = None,
        kind: int = INTERNAL,
        root: bool = False,
        linked: bool = False,
    ) -> None:
        body = bytearray()
        places: dict[str, tuple[Any, int]] = {}

        def place(key: str, tag: bytes, type_: Any) -> None:
            body.extend(tag)
            places[key] = (type_, len(body))
            body.extend(bytes(_size(type_)))

        place("trace_id", b"\x0a\x10", _TRACE_ID)
        place("span_id", b"\x12\x08", _SPAN_ID)
        if not root:
            place("parent_id", b"\x22\x08", _SPAN_ID)
        body += _text(5, name)
        body += b"\x30" + bytes([kind])
        place("start", b"\x39", "<i8")
        place("end", b"\x41", "<i8")
        for key, value in (attributes or {}).items():
            body += attribute(key, value)
        self._columns = dict(columns or {})
        for key, column in self._columns.items():
            value_tag, type_ = _VALUES[column]
            size = _size(type_)
            head = _text(1, key) + b"\x12" + varint(1 + size) + value_tag
            place(key, b"\x4a" + varint(len(head) + size) + head, type_)
        if linked:
            place("linked_trace_id", _LINK_HEAD, _TRACE_ID)
            place("linked_span_id", b"\x12\x08", _SPAN_ID)
        self._root, self._linked = root, linked
        self._size = len(body)
        head = b"\x12" + varint(len(body))
        self._body = bytes(body)
        self._places = places
        self._bare = self._layout(0)
        self.body = head + self._body
        """Of one span, as a field of a ScopeSpans."""
        self.layout = self._layout(len(head))
        """Of `body`: where the places are."""

    def encode(
        self,
        *,
        trace_ids: Bytes,
        span_ids: Bytes,
        starts_ns: Int64,
        ends_ns: Int64,
        parent_ids: Bytes | None = None,
        links: Bytes | None = None,
        columns: Mapping[str, npt.NDArray[Any]] | None = None,
        tails: Sequence[bytes] | None = None,
    ) -> bytes:
        """The spans as fields of a ScopeSpans.

        Args:
            trace_ids: [N, 16].
            span_ids: [N, 8].
            starts_ns: [N] nanoseconds of the wall clock.
            ends_ns: [N] the same.
            parent_ids: [N, 8]; not for roots.
            links: [N, 24] trace and span id that each is linked to; only if `linked`.
            columns: [N] values of every key given to the constructor.
            tails: Further fields of each span, encoded.
        """
        count = len(span_ids)
        if not count:
            return b""
        body, layout = (self.body, self.layout) if tails is None else (self._body, self._bare)
        data = bytearray(body * count)
        rows = np.frombuffer(data, layout)
        self.fill(rows, trace_ids, span_ids, starts_ns, ends_ns, parent_ids, columns)
        if self._linked:
            assert links is not None
            rows["linked_trace_id"], rows["linked_span_id"] = links[:, :16], links[:, 16:]
        if tails is None:
            return bytes(data)
        parts: list[bytes | memoryview] = []
        view, size = memoryview(data), self._size
        for begin, tail in zip(range(0, count * size, size), tails, strict=True):
            parts += (b"\x12", varint(size + len(tail)), view[begin : begin + size], tail)
        return b"".join(parts)

    def fill(
        self,
        rows: npt.NDArray[Any],
        trace_ids: Bytes,
        span_ids: Bytes,
        starts_ns: Int64,
        ends_ns: Int64,
        parent_ids: Bytes | None = None,
        columns: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """Overwrite what differs in [N] rows of `layout`; arguments as of `encode`."""
        rows["trace_id"], rows["span_id"] = trace_ids, span_ids
        rows["start"], rows["end"] = starts_ns, ends_ns
        if not self._root:
            assert parent_ids is not None
            rows["parent_id"] = parent_ids
        for key, column in self._columns.items():
            values = (columns or {})[key]
            rows[key] = _varints(values) if column == "int" else values

    def _layout(self, head: int) -> np.dtype[np.void]:
        """Where the places are in a row that begins with so many other bytes."""
        types, offsets = zip(*self._places.values(), strict=True)
        return np.dtype(
            {
                "names": list(self._places),
                "formats": list(types),
                "offsets": [head + offset for offset in offsets],
                "itemsize": head + self._size,
            }
        )


class SpanRow:
    """Spans that always come together, side by side: one row of bytes for all of them, so that a batch of them is laid out
    once.

    Args:
        templates: Of the spans.
    """

    def __init__(self, templates: Sequence[SpanTemplate]) -> None:
        self._body = b"".join(template.body for template in templates)
        self._layout = np.dtype([(str(index), template.layout) for index, template in enumerate(templates)])

    def rows(self, count: int) -> tuple[bytearray, list[npt.NDArray[Any]]]:
        """The bytes of so many rows, and of each template the [count] places in them, for SpanTemplate.fill."""
        data = bytearray(self._body * count)
        rows = np.frombuffer(data, self._layout)
        return data, [rows[name] for name in self._layout.names or ()]


class TextAttribute:
    """An attribute with a text that differs: what stands before the text is made once for each length.

    Args:
        key: Of the attribute.
    """

    def __init__(self, key: str) -> None:
        self._key = _text(1, key)
        self._heads: dict[int, bytes] = {}

    def encode(self, text: str) -> bytes:
        """A KeyValue as field `attributes` of a span."""
        data = text.encode()
        size = len(data)
        head = self._heads.get(size)
        if head is None:
            value = b"\x0a" + varint(size)
            entry = self._key + b"\x12" + varint(len(value) + size) + value
            head = self._heads[size] = b"\x4a" + varint(len(entry) + size) + entry
        return head + data


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


def status(error: str) -> bytes:
    """The status of a span that failed, as a field of it."""
    message = _text(2, error) + b"\x18\x02"
    return b"\x7a" + varint(len(message)) + message


def parent_field(span_id: bytes) -> bytes:
    """The parent of a span whose template has none, as a field of it."""
    return b"\x22\x08" + span_id


def link(context: bytes) -> bytes:
    """A link to that trace and span id (24 bytes), as a field of a span."""
    return b"".join((_LINK_HEAD, context[:16], b"\x12\x08", context[16:]))


def ids(data: bytes, size: int) -> Bytes:
    """[N, size] ids that lie back to back."""
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def _size(type_: Any) -> int:
    return int(np.dtype(type_).itemsize)


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
