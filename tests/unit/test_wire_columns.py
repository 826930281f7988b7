"""Columns of numbers in bytes fields."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.wire.columns import F32, U8, U32, U64, pack, unpack
from stagemesh.wire.errors import InvalidArgumentError


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_u32_goes_round(values: list[int]) -> None:
    assert unpack(pack(values, U32), U32, "x", len(values)).tolist() == values


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_u64_goes_round(values: list[int]) -> None:
    assert unpack(pack(np.array(values, np.uint64), U64), U64, "x").tolist() == values


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_f32_goes_round(values: list[float]) -> None:
    assert unpack(pack(values, F32), F32, "x").tolist() == values


def test_the_layout_is_little_endian_back_to_back() -> None:
    assert pack([1, 258], U32) == b"\1\0\0\0\2\1\0\0"
    assert pack([1, 258], U64) == b"\1" + b"\0" * 7 + b"\2\1" + b"\0" * 6
    assert pack([True, False], U8) == b"\1\0"


@pytest.mark.parametrize(("data", "length"), [(b"abc", None), (b"abcd", 2), (b"", 1), (b"abcdefgh", 1)])
def test_a_column_of_the_wrong_length_is_refused_by_name(data: bytes, length: int | None) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        unpack(data, U32, "rows.slots", length)
    assert (refused.value.field, refused.value.reason) == ("rows.slots", "BAD_COLUMN")
    assert refused.value.message.startswith("rows.slots")


def test_a_column_is_a_view_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        unpack(b"abcd", U32, "x")[0] = 1
