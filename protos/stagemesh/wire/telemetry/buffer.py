"""What waits to be made into spans. Appending is all that the serving thread does."""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

Chunk = tuple[bytes, int]
"""Spans as fields of a ScopeSpans, and how many; no more bytes than one export may carry."""
MAX_REQUEST_BYTES = 2 << 20
"""Of spans in one export; gRPC receivers take 4 MiB unless told otherwise."""


class Reader(Protocol):
    """Empties buffers: a SpanExporter."""

    def wake(self) -> None:
        """A buffer is half full."""

    def overtaken(self) -> None:
        """A buffer drops entries for the first time."""


class SpanBuffer(Generic[T]):
    """A bounded queue between the thread that serves and the one that exports.

    Args:
        limit: Entries kept, at least 1; those beyond are dropped and counted.
        reader: Woken whenever the buffer becomes half full.
    """

    def __init__(self, limit: int, reader: Reader) -> None:
        self._limit = limit
        self._wake_at = (limit - 1) // 2
        """Entries before the one that makes it half full."""
        self._reader = reader
        # A deque: its appends and pops are atomic, so that no entry falls between the threads.
        self._entries: deque[T] = deque()
        self.num_dropped = 0

    def add(self, entry: T) -> bool:
        """Keep an entry for the next export; False if it was dropped."""
        held = len(self._entries)
        if held < self._limit:
            self._entries.append(entry)
            if held == self._wake_at:
                self._reader.wake()
            return True
        if not self.num_dropped:
            self._reader.overtaken()
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
