"""Runs in a container: an OTLP receiver that prints every span as a line of JSON."""

from __future__ import annotations

import json
import signal
import sys
import threading
from concurrent import futures
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

ADDRESS = "0.0.0.0:4317"
LOCK = threading.Lock()


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes everything."""

    def Export(self, request: Any, context: Any) -> Any:
        for group in request.resource_spans:
            service = values(group.resource.attributes).get("service.name", "")
            for span in (span for scope in group.scope_spans for span in scope.spans):
                line = {
                    "service": service,
                    "name": span.name,
                    "trace_id": span.trace_id.hex(),
                    "span_id": span.span_id.hex(),
                    "parent_id": span.parent_span_id.hex(),
                    "start_ns": span.start_time_unix_nano,
                    "end_ns": span.end_time_unix_nano,
                    "links": [link.trace_id.hex() for link in span.links],
                    "attributes": values(span.attributes),
                }
                write(json.dumps(line))
        return trace_service_pb2.ExportTraceServiceResponse()


def write(line: str) -> None:
    """In one piece, whatever the other threads write."""
    with LOCK:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def values(attributes: Any) -> dict[str, Any]:
    """Those that are plain."""
    found = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        if kind in ("string_value", "int_value", "double_value", "bool_value"):
            found[attribute.key] = getattr(attribute.value, kind)
    return found


def main() -> None:
    """Serve until the container is stopped."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Sink(), server)
    server.add_insecure_port(ADDRESS)
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: server.stop(0))
    server.wait_for_termination()


if __name__ == "__main__":
    main()
