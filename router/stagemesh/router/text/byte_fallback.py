"""Streams of SentencePiece-style tokenizers (Llama 2, TinyLlama): tokens are text, or one byte as <0x0A>."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Pieces(dict[int, "str | int | None"]):
    """What each id stands for: text, a byte, or nothing. Filled at once, as in byte_level."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special: frozenset[str], replacements: Sequence[tuple[str, str]]
    ) -> None:
        super().__init__()
        self._backend = backend
        self._special = special
        self._replacements = replacements
        for id_ in range(backend.get_vocab_size(with_added_tokens=True)):
            self[id_]

    def __missing__(self, id_: int) -> str | int | None:
        token = self._backend.id_to_token(id_)
        piece: str | int | None = None
        if token is not None and token not in self._special:
            for old, new in self._replacements:
                token = token.replace(old, new)
            byte = _BYTE.fullmatch(token)
            piece = int(byte[1], 16) if byte else token
        self[id_] = piece
        return piece


class ByteFallbackDecoding:
    """What the streams of such a tokenizer share.

    Args:
        backend: The tokenizer.
        special: Tokens that decode to nothing.
        replacements: Text to replace in each token: (("▁", " "),).
        strip: A character, and how many of it to drop from the beginning of the text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: frozenset[str],
        replacements: Sequence[tuple[str, str]],
        strip: tuple[str, int],
    ) -> None:
        self._pieces = _Pieces(backend, special, replacements)
        self._strip = strip

    @classmethod
    def from_chain(
        cls, backend: tokenizers.Tokenizer, special: frozenset[str], chain: Sequence[Mapping[str, Any]]
    ) -> ByteFallbackDecoding | None:
        """For the chain Replace*, ByteFallback, Fuse, Strip?; None for any other."""
        links = list(chain)
        replacements = []
        while links and links[0]["type"] == "Replace" and "String" in links[0]["pattern"]:
            replacements.append((links[0]["pattern"]["String"], links[0]["content"]))
            links.pop(0)
        kinds = [link["type"] for link in links]
        if kinds == ["ByteFallback", "Fuse"]:
            return cls(backend, special, replacements, ("", 0))
        if kinds == ["ByteFallback", "Fuse", "Strip"] and links[2]["stop"] == 0:
            return cls(backend, special, replacements, (links[2]["content"], links[2]["start"]))
        return None

    def stream(self) -> ByteFallbackStream:
        """A new stream, at the beginning of a text."""
        return ByteFallbackStream(self._pieces, self._strip)


class ByteFallbackStream:
    """One text. Holds back a run of byte tokens until it ends.

    The decoder takes a run as a whole: if any byte of it is wrong, every byte becomes U+FFFD. So no character
    of a run is final before a text token, or `finish`, ends it, even where its own bytes are complete.
    """

    __slots__ = ("_num_strip", "_pieces", "_run", "_strip_char")

    def __init__(self, pieces: _Pieces, strip: tuple[str, int]) -> None:
        self._pieces = pieces
        self._strip_char, self._num_strip = strip
        self._run = bytearray()

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that became final."""
        text = ""
        pieces = self._pieces
        for id_ in ids:
            piece = pieces[id_]
            if isinstance(piece, str):
                text += self._end_run() + piece if self._run else piece
            elif piece is not None:
                self._run.append(piece)
        return self._strip(text) if self._num_strip and text else text

    def finish(self) -> str:
        """Returns the run that was held back."""
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        while self._num_strip and text:
            if not text.startswith(self._strip_char):
                self._num_strip = 0
                break
            text = text[1:]
            self._num_strip -= 1
        return text
