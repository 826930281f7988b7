"""Streams of any other tokenizer: decode a window of the last ids twice, and return what is new."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class WindowDecoding:
    """For decoders that look at a token and its neighbours at most (Metaspace, WordPiece, none)."""

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[str]) -> None:
        self._backend = backend
        ids = (backend.token_to_id(token) for token in special)
        self._special_ids = frozenset(id_ for id_ in ids if id_ is not None)

    def stream(self) -> WindowStream:
        """A new stream, at the beginning of a text."""
        return WindowStream(self._backend, self._special_ids)


class WindowStream:
    """One text. The window is the ids of the last text returned, for context, and those since."""

    __slots__ = ("_backend", "_num_context", "_special_ids", "_window")

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._window: list[int] = []
        self._num_context = 0

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that became final."""
        self._window += [id_ for id_ in ids if id_ not in self._special_ids]
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        del self._window[: self._num_context]
        self._num_context = len(self._window)
        return text

    def finish(self) -> str:
        """Returns what was held back."""
        text = self._new_text()
        self._window, self._num_context = [], 0
        return text

    def _new_text(self) -> str:
        context = self._backend.decode(self._window[: self._num_context])
        return self._backend.decode(self._window)[len(context) :]
