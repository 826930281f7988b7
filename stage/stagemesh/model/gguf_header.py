"""Reads the header of a GGUF file: values and strings at a cursor that never leaves the file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from stagemesh.wire.errors import ModelError

_STRING = 8
_ARRAY = 9
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = _SCALARS[4]
_U64 = _SCALARS[10]


class HeaderCursor:
    """A position in the mapped file. Every read checks the file's end first and raises ModelError past it.

    gguf.GGUFReader makes several numpy views of every array element and takes 4.4 s for a vocabulary of
    49,152; this takes under 0.1 s, and every stage worker opens the file.
    """

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path = path
        self.offset = 0
        self._buffer = buffer
        self._size = len(buffer)

    def u32(self) -> int:
        """The next 4 bytes as an unsigned number."""
        return int(self._scalar(_U32))

    def u64(self) -> int:
        """The next 8 bytes as an unsigned number."""
        return int(self._scalar(_U64))

    def string(self) -> str:
        """The next string: its length in bytes as u64, then UTF-8."""
        raw = self._take(self.u64())
        try:
            return str(raw, encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{self.path} is damaged: a string at byte {self.offset - len(raw)} is not UTF-8; "
                "download the file again"
            ) from error

    def value(self, *, keep_arrays: bool = True) -> object:
        """The next typed value as str, int, float, bool or list.

        Args:
            keep_arrays: False passes over an array without decoding it, and returns None for it.
        """
        kind = self.u32()
        if kind != _ARRAY:
            return self._typed(kind)
        kind, count = self.u32(), self.u64()
        if kind == _STRING:
            return self._strings(count, keep=keep_arrays)
        if kind not in _SCALARS:
            raise ModelError(
                f"{self.path} has an array of value type {kind} at byte {self.offset}, expected strings "
                "or numbers; the file is damaged or newer than this reader"
            )
        raw = self._take(count * _SCALARS[kind].size)
        if not keep_arrays:
            return None
        code = _SCALARS[kind].format
        values: list[object] = np.frombuffer(raw, dtype=np.dtype(code)).tolist()
        return values

    def _strings(self, count: int, *, keep: bool) -> list[str] | None:
        # A string takes at least its length: a count beyond that is damage, seen before any loop over it.
        if count > (self._size - self.offset) // _U64.size:
            self._past_end(count * _U64.size)
        if keep:
            return [self.string() for _ in range(count)]
        # A vocabulary of 49,152 is passed over in 20 ms so, in 90 ms by calls of u64() and _take().
        offset, last, length_at = self.offset, self._size - _U64.size, _U64.unpack_from
        for _ in range(count):
            if offset > last:
                self.offset = min(offset, self._size)
                self._past_end(_U64.size)
            offset += _U64.size + length_at(self._buffer, offset)[0]
        self._take(offset - self.offset)
        return None

    def _typed(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise ModelError(
                f"{self.path} has value type {kind} at byte {self.offset - 4}, expected 0 to 12; "
                "the file is damaged or newer than this reader"
            )
        return self._scalar(_SCALARS[kind])

    def _scalar(self, layout: struct.Struct) -> int | float | bool:
        begin, end = self.offset, self.offset + layout.size
        if end > self._size:
            self._past_end(layout.size)
        self.offset = end
        value: int | float | bool = layout.unpack_from(self._buffer, begin)[0]
        return value

    def _take(self, num_bytes: int) -> memoryview:
        begin, end = self.offset, self.offset + num_bytes
        if end > self._size:
            self._past_end(num_bytes)
        self.offset = end
        return self._buffer[begin:end]

    def _past_end(self, num_bytes: int) -> None:
        raise ModelError(
            f"{self.path} is truncated or damaged: its header needs {num_bytes} bytes at byte {self.offset}, "
            f"but the file ends at {self._size}; download it again"
        )
