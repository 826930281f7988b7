"""HTTP/2 header blocks (RFC 7541), as much as one end of a gRPC stream needs.

What is encoded uses no table and no Huffman code, and is a little longer for it. What is decoded may use all but the
dynamic table, which a peer leaves alone once it was told that there is no room in it.
"""

from __future__ import annotations

from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

_STATIC = tuple(
    (name, value)
    for name, _, value in (
        line.partition(b"=")
        for line in (
            b":authority|:method=GET|:method=POST|:path=/|:path=/index.html|:scheme=http|:scheme=https|:status=200|"
            b":status=204|:status=206|:status=304|:status=400|:status=404|:status=500|accept-charset|"
            b"accept-encoding=gzip, deflate|accept-language|accept-ranges|accept|access-control-allow-origin|age|allow|"
            b"authorization|cache-control|content-disposition|content-encoding|content-language|content-length|"
            b"content-location|content-range|content-type|cookie|date|etag|expect|expires|from|host|if-match|"
            b"if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|link|location|max-forwards|"
            b"proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after|server|set-cookie|"
            b"strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate"
        ).split(b"|")
    )
)
"""Appendix A; counted from 1 on the wire."""
_HUFFMAN_BITS = (
    b"ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHFIBCCCCCCCCCCCCCCCCCCCCCCDCDIOIJBKABABABBBACCBBBABCBAAB"
    b"CCCCCKGJIXPRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRTQRSSQQRQSRSSPRRRSRRSVVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTT"
    b"VSVWVVWWWWWXWWWWWVZ"
)
"""Appendix B: bits of the code of each byte, then of the end, A for 5. The code is canonical: shorter codes first, those
of one length in the order of their bytes."""
_FEWEST_BITS = 5
_END = 256


def _huffman_codes() -> dict[tuple[int, int], int]:
    """(bits, code) to byte."""
    bits = [letter - ord("A") + _FEWEST_BITS for letter in _HUFFMAN_BITS]
    codes: dict[tuple[int, int], int] = {}
    code = before = 0
    for symbol in sorted(range(len(bits)), key=lambda symbol: (bits[symbol], symbol)):
        code <<= bits[symbol] - before
        before = bits[symbol]
        codes[before, code] = symbol
        code += 1
    return codes


_HUFFMAN = _huffman_codes()


def encode(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block of these headers, each a literal that no table keeps."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)


def decode(block: bytes) -> Headers:
    """The headers of a block.

    Raises:
        ValueError: It is not one, or refers to a table that there is no room in.
    """
    headers: Headers = []
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = _number(block, at, 7)
                headers.append(_static(index))
            elif first & 0xE0 == 0x20:
                size, at = _number(block, at, 5)
                if size:
                    raise ValueError(f"a table of {size} bytes; there is room for none")
            else:
                # With incremental indexing, without, or never: without a table they are the same.
                index, at = _number(block, at, 6 if first & 0x40 else 4)
                name, at = (_static(index)[0], at) if index else _read_text(block, at)
                value, at = _read_text(block, at)
                headers.append((name, value))
    except IndexError:
        raise ValueError("a header block ends too early") from None
    return headers


def _static(index: int) -> tuple[bytes, bytes]:
    if not 0 < index <= len(_STATIC):
        raise ValueError(f"header {index}; the table has {len(_STATIC)}")
    return _STATIC[index - 1]


def _text(text: bytes) -> bytes:
    length = len(text)
    if length < 0x7F:
        return bytes((length,)) + text
    head, length = bytearray((0x7F,)), length - 0x7F
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + text


def _read_text(block: bytes, at: int) -> tuple[bytes, int]:
    huffman = block[at] & 0x80
    length, at = _number(block, at, 7)
    if at + length > len(block):
        raise IndexError
    text = block[at : at + length]
    return _from_huffman(text) if huffman else text, at + length


def _number(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """A number whose first `bits` are the last of the byte at `at`, and where it ends."""
    most = (1 << bits) - 1
    value, at = block[at] & most, at + 1
    if value < most:
        return value, at
    shift = 0
    while True:
        more, at = block[at], at + 1
        value += (more & 0x7F) << shift
        shift += 7
        if more < 0x80:
            return value, at
        if shift > 28:
            raise ValueError("a number of a header block is too long")


def _from_huffman(text: bytes) -> bytes:
    decoded = bytearray()
    bits = code = 0
    for byte in text:
        for shift in range(7, -1, -1):
            bits, code = bits + 1, code << 1 | byte >> shift & 1
            symbol = _HUFFMAN.get((bits, code))
            if symbol is not None:
                if symbol == _END:
                    raise ValueError("a text of a header block has an end in it")
                decoded.append(symbol)
                bits = code = 0
    if bits > 7 or code != (1 << bits) - 1:
        raise ValueError("a text of a header block does not end as it should")
    return bytes(decoded)
