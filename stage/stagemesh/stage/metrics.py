"""The stage's instruments: where each number of StageMetric comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version

from stagemesh.stage.leader.stats import StageStats
from stagemesh.wire.telemetry.metric_settings import MetricSettings
from stagemesh.wire.telemetry.metrics import Metrics, Values
from stagemesh.wire.telemetry.names import Attribute, StageMetric
from stagemesh.wire.telemetry.resource import service_attributes

LANE_ERRORS = ("INTERNAL", "INVALID_ARGUMENT", "UNAVAILABLE")
"""Status codes that lanes end with."""


class StageMetrics:
    """Reads them off the stage when it is scraped or a push is due.

    Args:
        stats: Of the stage.
        stage: Its index, for labels.
        service: Name of the service.
        listen: Its address.
        num_blocks: KV blocks it has room for.
        not_ready: Why it cannot serve now; empty when it can.
        num_dropped: Spans lost so far.
        pushed: Where to push them; None: nowhere.
    """

    def __init__(
        self,
        stats: StageStats,
        *,
        stage: str,
        service: str,
        listen: str,
        num_blocks: int,
        not_ready: Callable[[], str],
        num_dropped: Callable[[], int],
        pushed: MetricSettings | None = None,
    ) -> None:
        self._stats = stats
        self._labels = {Attribute.STAGE: stage}
        self._not_ready = not_ready
        self._metrics = Metrics(
            service_attributes(service, version=version("stagemesh"), instance=listen), pushed
        )
        self._metrics.add(stats.step)
        self._metrics.add(stats.link_time)
        observe = self._metrics.observe
        observe(StageMetric.TOKENS, lambda: self._by(stats.tokens, Attribute.PHASE))
        observe(StageMetric.LANE_ERRORS, self._lane_errors)
        observe(StageMetric.LINK_BYTES, self._link_bytes)
        observe(StageMetric.READY, lambda: self._one(0 if not_ready() else 1))
        observe(StageMetric.STARTS, lambda: self._one(stats.groups_started))
        observe(StageMetric.LANES, lambda: self._one(stats.lanes_opened))
        observe(StageMetric.BLOCKS, lambda: self._one(num_blocks))
        observe(StageMetric.SPANS_DROPPED, lambda: self._one(num_dropped()))

    def scrape(self) -> bytes:
        """In Prometheus' text format; called in a thread of the endpoint."""
        return self._metrics.scrape()

    def not_ready(self) -> str:
        """Why the stage cannot serve now; empty when it can."""
        return self._not_ready()

    def close(self) -> None:
        """Push what there is, within a bounded time."""
        self._metrics.close()

    def _one(self, value: float) -> Values:
        return [(value, self._labels)]

    def _by(self, counts: Mapping[str, int], key: str) -> Values:
        return [(count, {**self._labels, key: label}) for label, count in list(counts.items())]

    def _lane_errors(self) -> Values:
        # There from the start, at 0: a counter that begins with its first event shows no increase.
        return self._by({**dict.fromkeys(LANE_ERRORS, 0), **self._stats.lanes_failed}, Attribute.ERROR_TYPE)

    def _link_bytes(self) -> Values:
        # Before the histograms are read: they join when every instrument has been.
        self._stats.settle()
        for (link, transport), count in list(self._stats.link_bytes.items()):
            yield count, {**self._labels, Attribute.LINK: link, Attribute.TRANSPORT: transport}
