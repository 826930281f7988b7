"""Header blocks, by RFC 7541 and its examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.wire import hpack


@given(headers=st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.binary(max_size=400))))
def test_what_is_encoded_is_decoded(headers: list[tuple[bytes, bytes]]) -> None:
    assert hpack.decode(hpack.encode(headers)) == headers


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        (
            "400a637573746f6d2d6b65790d637573746f6d2d686561646572",
            [(b"custom-key", b"custom-header")],
        ),  # C.2.1
        ("040c2f73616d706c652f70617468", [(b":path", b"/sample/path")]),  # C.2.2
        ("100870617373776f726406736563726574", [(b"password", b"secret")]),  # C.2.3
        ("82", [(b":method", b"GET")]),  # C.2.4
        (
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",  # C.4.1
            [
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":path", b"/"),
                (b":authority", b"www.example.com"),
            ],
        ),
        ("6196d07abe941054d444a8200595040b8166e082a62d1bff", [(b"date", b"Mon, 21 Oct 2013 20:13:21 GMT")]),
        ("2088", [(b":status", b"200")]),  # there is no room in the table, as was asked for
    ],
)
def test_the_forms_of_a_header(block: str, headers: hpack.Headers) -> None:
    assert hpack.decode(bytes.fromhex(block)) == headers


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("80", "header 0"),
        ("be", "header 62; the table has 61"),
        ("3fe11f", "a table of 4096 bytes"),
        ("400a6375", "ends too early"),
        ("40", "ends too early"),
        ("00ffffffffffff7f", "too long"),
        ("0001618100", "does not end as it should"),
        ("00016184ffffffff", "has an end in it"),
    ],
)
def test_what_is_no_header_block_is_refused(block: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        hpack.decode(bytes.fromhex(block))
