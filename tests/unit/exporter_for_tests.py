"""An exporter that a test asks for the spans, and a second thread that comes when the test says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans

from stagemesh.wire.telemetry.settings import TraceSettings


class Exporter:
    """Takes the place of the thread: spans are asked for when a test wants them."""

    def __init__(self, **settings: Any) -> None:
        self.settings = TraceSettings(endpoint="x:1", **settings)
        self.sources: list[Callable[[], list[tuple[bytes, int]]]] = []
        self.num_wakes = 0

    def register(self, source: Callable[[], list[tuple[bytes, int]]]) -> None:
        self.sources.append(source)

    def wake(self) -> None:
        self.num_wakes += 1

    def overtaken(self) -> None:
        """Nobody reads a log here."""

    def spans(self) -> list[Any]:
        chunks = [chunk for source in self.sources for chunk in source()]
        found = [span for data, _ in chunks for span in ScopeSpans.FromString(data).spans]
        assert len(found) == sum(count for _, count in chunks)
        return found


class Intruder:
    """Another thread that comes while this one is in the middle of something, and gets as far as the lock lets it.

    Args:
        spans: Whose lock it is; from now on the lock tells who has to wait for it.
        act: What the other thread does.
    """

    def __init__(self, spans: Any, act: Callable[[], object]) -> None:
        self._lock, spans._making = spans._making, self
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._stands, self._may_go_on = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._stands.set()
            self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def come(self) -> None:
        """It comes; back when it has done what it came for, waits for the lock, or is where it is to `stay`."""
        self._thread.start()
        self._stands.wait()

    def stay(self) -> None:
        """Called by the other thread: it stays where it is until this one has called `leave`."""
        self._stands.set()
        self._may_go_on.wait()

    def leave(self) -> None:
        """It does the rest, and has gone."""
        self._may_go_on.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._act()
        finally:
            self._stands.set()
