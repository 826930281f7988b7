"""Columns: little-endian numbers back to back in a bytes field. Needs numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stagemesh.wire.errors import InvalidArgumentError

U8 = np.dtype("<u1")
U32 = np.dtype("<u4")
U64 = np.dtype("<u8")
F32 = np.dtype("<f4")

Column = npt.NDArray[Any]


def pack(values: npt.ArrayLike, dtype: np.dtype[Any]) -> bytes:
    """The bytes of a column."""
    return np.asarray(values, dtype=dtype).tobytes()


def unpack(data: bytes, dtype: np.dtype[Any], field: str, length: int | None = None) -> Column:
    """A read-only array over the bytes of a column; `length` is the number of entries it must have."""
    if len(data) % dtype.itemsize:
        raise InvalidArgumentError(
            f"{field} has {len(data)} bytes; expected a multiple of {dtype.itemsize}",
            field=field,
            reason="BAD_COLUMN",
        )
    column = np.frombuffer(data, dtype=dtype)
    if length is not None and len(column) != length:
        raise InvalidArgumentError(
            f"{field} has {len(column)} entries; expected {length}, as the columns beside it",
            field=field,
            reason="BAD_COLUMN",
        )
    return column
