"""The instruments of one process, through OpenTelemetry's SDK: scraped by Prometheus, and pushed by OTLP where asked for.

Counters and gauges are asynchronous instruments: read when somebody scrapes or a push is due, from numbers that the
process keeps anyway. Histograms are kept by `histogram` and join the SDK's data on its way to the exporter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics import export as sdk
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest

from stagemesh.wire.errors import ConfigError
from stagemesh.wire.telemetry.histogram import BulkHistogram
from stagemesh.wire.telemetry.metric_settings import MetricSettings
from stagemesh.wire.telemetry.names import SCOPE, Metric
from stagemesh.wire.telemetry.resource import make_resource
from stagemesh.wire.telemetry.variables import GRPC

Values = Iterable[tuple[float, Mapping[str, str]]]
"""Of one instrument: a value for each set of labels."""


CLOSE_TIMEOUT_S = 2.0
"""What a receiver that does not answer may cost the end of a process."""


class _Scraped(PrometheusMetricReader):
    """Adds histograms to what the SDK has collected."""

    def __init__(self, histograms: list[BulkHistogram], registry: CollectorRegistry) -> None:
        self._histograms = histograms
        super().__init__(scope_info_enabled=False, registry=registry)

    def _receive_metrics(self, metrics_data: Any, timeout_millis: float = 10_000, **options: Any) -> None:
        if metrics_data is not None:
            super()._receive_metrics(_joined(metrics_data, self._histograms), timeout_millis, **options)


class _Pushed(sdk.PeriodicExportingMetricReader):
    """The same for what is pushed, in a thread of the SDK's."""

    def __init__(self, histograms: list[BulkHistogram], settings: MetricSettings) -> None:
        self._histograms = histograms
        super().__init__(
            _make_exporter(settings.protocol),
            export_interval_millis=settings.interval_s * 1e3,
            export_timeout_millis=settings.timeout_s * 1e3,
        )

    def _receive_metrics(self, metrics_data: Any, timeout_millis: float = 10_000, **options: Any) -> None:
        if metrics_data is not None:
            super()._receive_metrics(_joined(metrics_data, self._histograms), timeout_millis, **options)


class Metrics:
    """Every instrument of a router or a stage.

    Args:
        attributes: Of the resource: the target_info of a scrape.
        pushed: Where to push them; None: nowhere.

    Raises:
        ConfigError: An OTEL_* variable of the exporter is wrong.
    """

    def __init__(self, attributes: Mapping[str, str], pushed: MetricSettings | None = None) -> None:
        self._registry = CollectorRegistry()
        self._histograms: list[BulkHistogram] = []
        ProcessCollector(registry=self._registry)
        readers: list[sdk.MetricReader] = [_Scraped(self._histograms, self._registry)]
        if pushed:
            readers.append(_Pushed(self._histograms, pushed))
        self._provider = MeterProvider(readers, resource=make_resource(attributes), shutdown_on_exit=False)
        self._meter = self._provider.get_meter(SCOPE)

    def observe(self, metric: Metric, read: Callable[[], Values]) -> None:
        """Have `read` called for a counter's or a gauge's values at every scrape, in the scraping thread, and before every
        push, in its thread."""

        def callback(options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, dict(labels)) for value, labels in read()]

        create = (
            self._meter.create_observable_counter
            if metric.kind == "counter"
            else self._meter.create_observable_gauge
        )
        create(metric.name, [callback], unit=metric.unit, description=metric.description)

    def observe_one(self, metric: Metric, read: Callable[[], float]) -> None:
        """The same for an instrument without labels."""
        self.observe(metric, lambda: [(read(), {})])

    def add(self, histogram: BulkHistogram) -> None:
        """Show a histogram too."""
        self._histograms.append(histogram)

    def scrape(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Push what there is, for CLOSE_TIMEOUT_S at most."""
        self._provider.shutdown(CLOSE_TIMEOUT_S * 1e3)


def _make_exporter(protocol: str) -> sdk.MetricExporter:
    try:
        if protocol == GRPC:
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

            return OTLPMetricExporter()
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

        return HttpExporter()
    except Exception as error:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_*: the exporter refused its settings: {error}") from error


def _joined(data: sdk.MetricsData, histograms: list[BulkHistogram]) -> sdk.MetricsData:
    first = data.resource_metrics[0]
    scope = first.scope_metrics[0]
    metrics = [*scope.metrics, *(_metric(histogram) for histogram in histograms)]
    joined = sdk.ScopeMetrics(scope=scope.scope, metrics=metrics, schema_url=scope.schema_url)
    return sdk.MetricsData(
        resource_metrics=[
            sdk.ResourceMetrics(
                resource=first.resource,
                scope_metrics=[joined, *first.scope_metrics[1:]],
                schema_url=first.schema_url,
            ),
            *data.resource_metrics[1:],
        ]
    )


def _metric(histogram: BulkHistogram) -> sdk.Metric:
    metric, now_ns = histogram.metric, time.time_ns()
    points = [
        sdk.HistogramDataPoint(
            attributes=snapshot.attributes,
            start_time_unix_nano=histogram.started_ns,
            time_unix_nano=now_ns,
            count=snapshot.count,
            sum=snapshot.total,
            bucket_counts=snapshot.bucket_counts,
            explicit_bounds=metric.buckets,
            min=snapshot.lowest,
            max=snapshot.highest,
        )
        for snapshot in histogram.snapshots()
    ]
    data = sdk.Histogram(points, aggregation_temporality=sdk.AggregationTemporality.CUMULATIVE)
    return sdk.Metric(name=metric.name, description=metric.description, unit=metric.unit, data=data)
