"""A real OTLP receiver on a port of its own, gRPC and HTTP, that keeps what comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from mesh_processes import wait_for
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from otlp_servers import grpc_server, http_server

from stagemesh.wire.telemetry.names import Attribute


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span, with the service that made it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    kind: int
    links: tuple[tuple[str, str], ...]
    """(trace id, span id)."""
    attributes: dict[str, Any] = field(hash=False)
    error: str | None = None

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class Spans:
    """Everything received so far, from any thread."""

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._lock = threading.Lock()

    def take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        found = []
        for group in request.resource_spans:
            service = _attributes(group.resource.attributes)[Attribute.SERVICE_NAME]
            found += [_received(service, span) for scope in group.scope_spans for span in scope.spans]
        with self._lock:
            self._spans += found

    @property
    def all(self) -> list[ReceivedSpan]:
        with self._lock:
            return list(self._spans)

    def named(self, name: str) -> list[ReceivedSpan]:
        return [span for span in self.all if span.name == name]

    def of_trace(self, trace_id: str) -> list[ReceivedSpan]:
        return [span for span in self.all if span.trace_id == trace_id]

    def children(self, parent: ReceivedSpan) -> list[ReceivedSpan]:
        """In order of time."""
        found = [span for span in self.of_trace(parent.trace_id) if span.parent_id == parent.span_id]
        return sorted(found, key=lambda span: (span.start_ns, span.end_ns))

    def wait(self, enough: Callable[[list[ReceivedSpan]], bool], what: str) -> list[ReceivedSpan]:
        return wait_for(lambda: spans if enough(spans := self.all) else None, what)

    def clear(self) -> None:
        with self._lock:
            self._spans.clear()


@contextmanager
def otlp_grpc_receiver() -> Iterator[tuple[str, Spans]]:
    """(address for OTEL_EXPORTER_OTLP_ENDPOINT, what came)."""
    spans = Spans()

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            spans.take(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    def add_servicer(server: grpc.Server) -> None:
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)

    with grpc_server(add_servicer) as address:
        yield address, spans


@contextmanager
def otlp_http_receiver(headers: Mapping[str, str] | None = None) -> Iterator[tuple[str, Spans]]:
    """The same over HTTP, for senders that bring these headers."""
    spans = Spans()

    def take(body: bytes) -> None:
        spans.take(trace_service_pb2.ExportTraceServiceRequest.FromString(body))

    with http_server("/v1/traces", take, headers) as address:
        yield address, spans


def _received(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        kind=span.kind,
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        attributes=_attributes(span.attributes),
        error=span.status.message if span.status.code == 2 else None,
    )


def _attributes(entries: Any) -> dict[str, Any]:
    return {entry.key: _value(entry.value) for entry in entries}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
