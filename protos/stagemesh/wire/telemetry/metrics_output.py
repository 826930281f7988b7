"""The metrics of a router or a stage on their way out: served to Prometheus, pushed by OTLP, or both."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from stagemesh.wire.address import check_listen
from stagemesh.wire.telemetry.endpoint import MetricsEndpoint
from stagemesh.wire.telemetry.metric_settings import MetricSettings

log = logging.getLogger(__name__)


class MetricsSource(Protocol):
    """RouterMetrics or StageMetrics."""

    def scrape(self) -> bytes:
        """In Prometheus' text format; called in a thread of the endpoint."""

    def not_ready(self) -> str:
        """Why the process cannot serve now; empty when it can."""

    def close(self) -> None:
        """Push what there is, within a bounded time."""


class MetricsOutput:
    """Open until `close`. Made in the process's event loop.

    Args:
        source: What goes out.
        listen: Of --metrics; None without an endpoint.
        insecure: Of --insecure.
        pushed: Where the source pushes; None if it does not.

    Raises:
        ConfigError: The endpoint cannot listen there.
    """

    def __init__(
        self, source: MetricsSource, listen: str | None, *, insecure: bool, pushed: MetricSettings | None
    ) -> None:
        self._source = source
        self._endpoint: MetricsEndpoint | None = None
        if listen is not None:
            check_listen(listen, insecure=insecure, key="--metrics")
            self._endpoint = MetricsEndpoint(
                listen, source.scrape, source.not_ready, asyncio.get_running_loop()
            )
        self._pushed = pushed

    def announce(self) -> None:
        """Say where they go in the log."""
        if self._endpoint:
            log.info("metrics on http://%s/metrics", self._endpoint.address)
        if self._pushed:
            log.info("metrics to %s every %g s", self._pushed.endpoint, self._pushed.interval_s)

    async def close(self) -> None:
        """Stop listening, and push what there is; a receiver that does not answer delays it by two seconds at most."""
        if self._endpoint:
            self._endpoint.close()
        await asyncio.to_thread(self._source.close)
