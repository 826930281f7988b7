"""The OTLP exporters of OpenTelemetry, for requests that are encoded already.

They bring TLS, headers, compression, retries and the reading of their OTEL_* variables; only the step from span
objects to a message is left out.
"""

from __future__ import annotations

from typing import Any, Protocol

from stagemesh.wire.errors import ConfigError
from stagemesh.wire.telemetry.variables import GRPC

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class Sender(Protocol):
    """Sends one ExportTraceServiceRequest."""

    def send(self, request: bytes) -> bool:
        """Whether the receiver took it; retries by itself, for OTEL_EXPORTER_OTLP_TIMEOUT at most."""

    def shutdown(self) -> None:
        """Break off what is under way."""


def make_sender(protocol: str) -> Sender:
    """For OTEL_EXPORTER_OTLP_PROTOCOL; ConfigError where an OTEL_* variable of the exporter is wrong."""
    try:
        return _make_grpc() if protocol == GRPC else _make_http()
    except Exception as error:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_*: the exporter refused its settings: {error}") from error


def _make_grpc() -> Sender:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
    from opentelemetry.sdk.trace.export import SpanExportResult

    class Stub:
        """Of TraceService, for requests that are bytes."""

        def __init__(self, channel: Any) -> None:
            self.Export = channel.unary_unary(
                _EXPORT, response_deserializer=ExportTraceServiceResponse.FromString
            )

    class GrpcSender(OTLPSpanExporter):
        def send(self, request: bytes) -> bool:
            data: Any = request
            return bool(self._export(data) is SpanExportResult.SUCCESS)

        def _initialize_channel_and_stub(self) -> None:
            super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
            self._client: Any = Stub(self._channel)

        def _translate_data(self, data: Any) -> Any:
            return data

        def _count_data(self, data: Any) -> int:
            return 1

    return GrpcSender()


def _make_http() -> Sender:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    class HttpSender(OTLPSpanExporter):
        def send(self, request: bytes) -> bool:
            return bool(self._client.export(request).success)

    return HttpSender()
