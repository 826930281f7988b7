"""What waits to be made into spans. Appending is all that the serving thread does."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

Chunk = tuple[bytes, int]
"""Spans as fields of a ScopeSpans, and how many; no more bytes than one export may carry."""
MAX_REQUEST_BYTES = 2 << 20
"""Of spans in one export; gRPC receivers take 4 MiB unless told otherwise."""


class SpanBuffer(Generic[T]):
    """A bounded queue between the thread that serves and the one that exports.

    Args:
        limit: Entries kept; those beyond are dropped and counted.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # A deque: its appends and pops are atomic, so that no entry falls between the threads.
        self._entries: deque[T] = deque()
        self.num_dropped = 0

    def add(self, entry: T) -> bool:
        """Keep an entry for the next export; False if it was dropped."""
        if len(self._entries) < self._limit:
            self._entries.append(entry)
            return True
        self.num_dropped += 1
        return False

    def take(self) -> list[T]:
        """Everything kept so far."""
        return [self._entries.popleft() for _ in range(len(self._entries))]


def merge(chunks: list[Chunk], max_batch: int) -> list[Chunk]:
    """Small chunks into fewer that one export may carry."""
    merged: list[Chunk] = []
    parts: list[bytes] = []
    count = size = 0
    for data, spans in chunks:
        if parts and (count + spans > max_batch or size + len(data) > MAX_REQUEST_BYTES):
            merged.append((b"".join(parts), count))
            parts, count, size = [], 0, 0
        parts.append(data)
        count, size = count + spans, size + len(data)
    if parts:
        merged.append((b"".join(parts), count))
    return merged
