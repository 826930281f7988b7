"""What waits to be made into spans. Appending is all that the serving thread does."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

Chunk = tuple[bytes, int]
"""Spans as fields of a ScopeSpans, and how many: what one export carries."""
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


def split(spans: list[bytes], max_batch: int) -> list[Chunk]:
    """Single spans into chunks that one export may carry."""
    chunks: list[Chunk] = []
    part: list[bytes] = []
    size = 0
    for span in spans:
        if part and (len(part) >= max_batch or size + len(span) > MAX_REQUEST_BYTES):
            chunks.append((b"".join(part), len(part)))
            part, size = [], 0
        part.append(span)
        size += len(span)
    if part:
        chunks.append((b"".join(part), len(part)))
    return chunks


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
