"""Spans that are lost on their way to the receiver are counted, whoever is to blame."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span

from stagemesh.wire.telemetry import exporter as exporter_module
from stagemesh.wire.telemetry.buffer import Chunk, SpanBuffer
from stagemesh.wire.telemetry.exporter import SpanExporter
from stagemesh.wire.telemetry.settings import TraceSettings


class Sender:
    """Takes a request, refuses it, or has a bug: as `outcomes` say, one after the other."""

    def __init__(self, outcomes: list[bool | Exception]) -> None:
        self._outcomes = outcomes
        self.names: list[str] = []

    def send(self, request: bytes) -> bool:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome:
            for of_resource in ExportTraceServiceRequest.FromString(request).resource_spans:
                self.names += [span.name for scope in of_resource.scope_spans for span in scope.spans]
        return outcome

    def shutdown(self) -> None:
        """Nothing is under way."""


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> Sender:
    sender = Sender([])
    monkeypatch.setattr(exporter_module, "make_sender", lambda protocol: sender)
    return sender


@pytest.fixture
def exporter(sender: Sender) -> Iterator[SpanExporter]:
    """Exports when a test says so; a batch is a chunk."""
    exporter = SpanExporter(TraceSettings(endpoint="x:1", delay_s=3600.0, max_batch=2), {})
    yield exporter
    exporter._sources.clear()
    exporter.close()


def chunk(name: str, count: int = 2) -> Chunk:
    return ScopeSpans(spans=[Span(name=name)] * count).SerializeToString(), count


def test_spans_lost_by_a_bug_in_an_export_are_dropped_ones(
    exporter: SpanExporter, sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """The batches behind the one that failed are sent."""
    exporter.register(lambda: [chunk("first"), chunk("second"), chunk("third"), chunk("fourth", 1)])
    sender._outcomes += [True, RuntimeError("a bug"), False, True]
    with caplog.at_level(logging.ERROR):
        exporter.flush()
    assert sender.names == ["first", "first", "fourth"]
    assert (exporter.num_exported, exporter.num_dropped) == (3, 4)
    assert "2 spans could not be exported" in caplog.text
    assert "a bug" in caplog.text


def test_a_source_with_a_bug_moves_the_counter_and_keeps_nobody_elses_spans(
    exporter: SpanExporter, sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> list[Chunk]:
        raise RuntimeError("no spans of these")

    exporter.register(lambda: [chunk("before", 1)])
    exporter.register(broken)
    exporter.register(lambda: [chunk("behind", 1)])
    sender._outcomes += [True]
    with caplog.at_level(logging.ERROR):
        exporter.flush()
    assert sender.names == ["before", "behind"]
    assert (exporter.num_exported, exporter.num_dropped) == (2, 1)
    assert "no spans of these" in caplog.text


def test_a_half_full_buffer_is_sent_before_its_time(exporter: SpanExporter, sender: Sender) -> None:
    buffer: SpanBuffer[Chunk] = SpanBuffer(8, exporter)
    num_asked = 0

    def source() -> list[Chunk]:
        nonlocal num_asked
        num_asked += 1
        return buffer.take()

    exporter.register(source)
    sender._outcomes += [True] * 8
    for name in ("first", "second"):
        assert all(buffer.add(chunk(name, 1)) for _ in range(4))
        deadline = time.monotonic() + 10
        while sender.names.count(name) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sender.names.count(name) == 4
    assert num_asked == 2, "once for each half"


def test_the_first_drop_is_said_and_the_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    exporter = SpanExporter(TraceSettings(endpoint="http://x:1", max_queued=6), {})
    exporter.close()
    with caplog.at_level(logging.INFO):
        exporter.announce()
    assert "traces to http://x:1 every 5 s" in caplog.text
    for buffer in (SpanBuffer[int](2, exporter), SpanBuffer[int](2, exporter)):
        for number in range(5):
            buffer.add(number)
        assert buffer.num_dropped == 3
    assert caplog.text.count("spans are dropped") == 1
    assert "OTEL_BSP_MAX_QUEUE_SIZE=6" in caplog.text


def test_a_bug_between_source_and_sender_moves_the_counter_and_the_thread_lives(
    sender: Sender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(chunks: list[Chunk], most: int) -> list[Chunk]:
        raise RuntimeError("no batches of these")

    monkeypatch.setattr(exporter_module, "merge", broken)
    exporter = SpanExporter(TraceSettings(endpoint="x:1", delay_s=0.01), {})
    exporter.register(lambda: [chunk("lost")])
    try:
        deadline = time.monotonic() + 10
        while exporter.num_dropped < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        exporter.close()
    assert exporter.num_dropped >= 2
    assert exporter.num_exported == 0
    assert "no batches of these" in caplog.text
