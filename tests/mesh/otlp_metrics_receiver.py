"""A real OTLP receiver of metrics on a port of its own, gRPC or HTTP, that keeps the newest of each series."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from otlp_servers import grpc_server, http_server

from stagemesh.wire.telemetry.names import Attribute


class PushedMetrics:
    """What came so far, from any thread."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], tuple[str, str]] = {}
        self._values: dict[tuple[str, str], dict[frozenset[tuple[str, str]], float]] = {}
        self._lock = threading.Lock()
        self.num_pushes = 0

    def take(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        with self._lock:
            self.num_pushes += 1
            for group in request.resource_metrics:
                resource = {entry.key: entry.value.string_value for entry in group.resource.attributes}
                service = resource[Attribute.SERVICE_NAME]
                for metric in (metric for scope in group.scope_metrics for metric in scope.metrics):
                    kind = metric.WhichOneof("data")
                    self._kinds[service, metric.name] = (kind, metric.unit)
                    for point in getattr(metric, kind).data_points:
                        labels = frozenset(
                            (entry.key, entry.value.string_value) for entry in point.attributes
                        )
                        series = self._values.setdefault((service, metric.name), {})
                        series[labels] = _value(kind, metric, point)

    @property
    def services(self) -> set[str]:
        with self._lock:
            return {service for service, _ in self._kinds}

    def names(self, service: str) -> set[str]:
        """Of every metric a service pushed."""
        with self._lock:
            return {name for owner, name in self._kinds if owner == service}

    def kind(self, service: str, name: str) -> tuple[str, str]:
        """sum, gauge or histogram, and the unit."""
        with self._lock:
            return self._kinds[service, name]

    def total(self, service: str, name: str, **labels: str) -> float:
        """Of the newest value of all series with these labels, dots written as underscores; counts of histograms."""
        wanted = {key.replace("_", "."): value for key, value in labels.items()}
        with self._lock:
            series = self._values.get((service, name), {})
            return sum(
                value
                for found, value in series.items()
                if wanted.items() <= {key.replace("_", "."): label for key, label in found}.items()
            )


@contextmanager
def otlp_grpc_metrics_receiver() -> Iterator[tuple[str, PushedMetrics]]:
    """(address for OTEL_EXPORTER_OTLP_METRICS_ENDPOINT, what came)."""
    pushed = PushedMetrics()

    class Servicer(metrics_service_pb2_grpc.MetricsServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            pushed.take(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    def add_servicer(server: grpc.Server) -> None:
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Servicer(), server)

    with grpc_server(add_servicer) as address:
        yield address, pushed


@contextmanager
def otlp_http_metrics_receiver() -> Iterator[tuple[str, PushedMetrics]]:
    """The same over HTTP, for OTEL_EXPORTER_OTLP_ENDPOINT."""
    pushed = PushedMetrics()

    def take(body: bytes) -> None:
        pushed.take(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))

    with http_server("/v1/metrics", take) as address:
        yield address, pushed


def _value(kind: str, metric: Any, point: Any) -> float:
    if kind == "gauge":
        return float(point.as_double or point.as_int)
    assert getattr(metric, kind).aggregation_temporality == 2, "cumulative"
    if kind == "histogram":
        assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
        assert sum(point.bucket_counts) == point.count
        return float(point.count)
    assert metric.sum.is_monotonic
    return float(point.as_double or point.as_int)
