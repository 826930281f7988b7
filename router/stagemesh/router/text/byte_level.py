"""Streams of byte-level tokenizers (GPT-2, Llama 3, SmolLM2): a token is bytes, the text is their UTF-8."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

import tokenizers


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others for characters from U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = byte_alphabet()


class _Pieces(dict[int, bytes]):
    """The bytes of each id. Filled at once, so that what a router needs does not grow while it serves: 1 us an
    id. What the tokenizer does not know (an embedding may be padded) stands for nothing."""

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[str]) -> None:
        super().__init__()
        self._backend = backend
        self._special = special
        for id_ in range(backend.get_vocab_size(with_added_tokens=True)):
            self[id_]

    def __missing__(self, id_: int) -> bytes:
        token = self._backend.id_to_token(id_)
        if token is None or token in self._special:
            piece = b""
        else:
            try:
                piece = bytes(map(_BYTE_OF.__getitem__, token))
            except KeyError:
                # An added token is written as itself, not in the alphabet.
                piece = token.encode()
        self[id_] = piece
        return piece


class ByteLevelDecoding:
    """What the streams of a byte-level tokenizer share: the bytes of each id."""

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[str]) -> None:
        self._pieces = _Pieces(backend, special)

    def stream(self) -> ByteLevelStream:
        """A new stream, at the beginning of a text."""
        return ByteLevelStream(self._pieces)


class ByteLevelStream:
    """One text. Holds back at most the three bytes of a character that is not complete."""

    __slots__ = ("_pending", "_pieces")

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._pending = b""

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that became final."""
        pieces = self._pieces
        data = pieces[ids[0]] if len(ids) == 1 else b"".join([pieces[id_] for id_ in ids])
        if self._pending:
            data = self._pending + data
        # Bytes that cannot begin or continue a character become U+FFFD at once, one for each longest such
        # run that is a prefix of a character: Rust and Python agree on that (Unicode's recommended practice).
        text, num_used = utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        return text

    def finish(self) -> str:
        """An incomplete character at the end becomes U+FFFD."""
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text
