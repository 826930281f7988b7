"""How a tokenizer turns ids into text, in a form that can be fed piece by piece.

`tokenizers` decodes whole sequences: it looks the tokens up, drops special ones, and runs a chain of decoders
over the list. The two chains that matter are exactly streamable and get streams of their own; any other is
decoded in windows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import tokenizers

from stagemesh.router.text.byte_fallback import ByteFallbackDecoding
from stagemesh.router.text.byte_level import ByteLevelDecoding
from stagemesh.router.text.window import WindowDecoding


class TextStream(Protocol):
    """The text of one sequence: all that `push` and `finish` return, joined, is `decode` of all ids."""

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that became final."""

    def finish(self) -> str:
        """Returns what was held back; nothing may be pushed afterwards."""


class Decoding(Protocol):
    """What the streams of one tokenizer share."""

    def stream(self) -> TextStream:
        """A new stream, at the beginning of a text."""


def decoding_of(backend: tokenizers.Tokenizer, *, special: Collection[str]) -> Decoding:
    """The way to decode with a tokenizer.

    Args:
        backend: The tokenizer.
        special: Tokens that decode to nothing.
    """
    special = frozenset(special)
    chain = _decoder_chain(backend)
    if [link["type"] for link in chain] == ["ByteLevel"]:
        return ByteLevelDecoding(backend, special)
    fallback = ByteFallbackDecoding.from_chain(backend, special, chain)
    return fallback or WindowDecoding(backend, special)


def _decoder_chain(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoders as tokenizer.json describes them, nested sequences flattened."""
    if backend.decoder is None:
        return []
    # The state of a decoder is its JSON; the tokenizer's own JSON would bring the whole vocabulary.
    pending: list[dict[str, Any]] = [json.loads(backend.decoder.__getstate__())]
    chain = []
    while pending:
        link = pending.pop(0)
        if link["type"] == "Sequence":
            pending = link["decoders"] + pending
        else:
            chain.append(link)
    return chain
