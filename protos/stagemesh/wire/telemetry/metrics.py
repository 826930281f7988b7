"""The instruments of one process, through OpenTelemetry's SDK, to be scraped by Prometheus.

Counters and gauges are asynchronous instruments: read when somebody scrapes, from numbers that the process keeps
anyway. Histograms are kept by `histogram` and join the SDK's data on its way to the exporter.
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

from stagemesh.wire.telemetry.histogram import BulkHistogram
from stagemesh.wire.telemetry.names import SCOPE, Metric
from stagemesh.wire.telemetry.resource import make_resource

Values = Iterable[tuple[float, Mapping[str, str]]]
"""Of one instrument: a value for each set of labels."""


class _Reader(PrometheusMetricReader):
    """Adds histograms to what the SDK has collected."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(scope_info_enabled=False, registry=registry)
        self.histograms: list[BulkHistogram] = []

    def _receive_metrics(self, metrics_data: Any, timeout_millis: float = 10_000, **options: Any) -> None:
        if metrics_data is not None:
            super()._receive_metrics(_joined(metrics_data, self.histograms), timeout_millis, **options)


class Metrics:
    """Every instrument of a router or a stage.

    Args:
        attributes: Of the resource: the target_info of a scrape.
    """

    def __init__(self, attributes: Mapping[str, str]) -> None:
        self._registry = CollectorRegistry()
        self._reader = _Reader(self._registry)
        ProcessCollector(registry=self._registry)
        provider = MeterProvider([self._reader], resource=make_resource(attributes), shutdown_on_exit=False)
        self._meter = provider.get_meter(SCOPE)

    def observe(self, metric: Metric, read: Callable[[], Values]) -> None:
        """Have `read` called at every scrape, in the scraping thread, for a counter's or a gauge's values."""

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
        self._reader.histograms.append(histogram)

    def scrape(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


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
