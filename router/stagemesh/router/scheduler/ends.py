"""Which of many new tokens end their request, without asking each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class EndTokens:
    """Every end token that any request named.

    Requests of a lane name the same few, if any. So a look into one table says of almost every token that it
    ends nothing; the rest is asked one by one.
    """

    def __init__(self) -> None:
        # The last entry stands for every token beyond the table, and is never set.
        self._table = np.zeros(1, np.bool_)
        self._known: set[frozenset[int]] = set()

    def add(self, token_ids: frozenset[int]) -> None:
        """A request's end tokens."""
        if token_ids in self._known:
            return
        self._known.add(token_ids)
        size = max(len(self._table), max(token_ids, default=0) + 2)
        table = np.zeros(size, np.bool_)
        table[: len(self._table)] = self._table
        table[list(token_ids)] = True
        self._table = table

    def candidates(self, tokens: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """[rows] where a token ends some request, not necessarily its own."""
        return self._table.take(tokens, mode="clip")
