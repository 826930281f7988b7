"""An exporter that a test asks for the spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans

from stagemesh.wire.telemetry.settings import TraceSettings


class Exporter:
    """Spans are asked for when a test wants them."""

    def __init__(self, **settings: Any) -> None:
        self.settings = TraceSettings(endpoint="x:1", **settings)
        self.source: Callable[[], list[tuple[bytes, int]]]

    def register(self, source: Callable[[], list[tuple[bytes, int]]]) -> None:
        self.source = source

    def spans(self) -> list[Any]:
        chunks = self.source()
        found = [span for data, _ in chunks for span in ScopeSpans.FromString(data).spans]
        assert len(found) == sum(count for _, count in chunks)
        return found
