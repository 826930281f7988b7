"""Tracing of one router: its exporter, and the spans of its three concerns."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Self

from stagemesh.router.tracing.request_spans import RequestSpans
from stagemesh.router.tracing.server_spans import ServerSpans
from stagemesh.router.tracing.step_spans import StepSpans
from stagemesh.wire.telemetry.settings import TraceSettings

SERVICE_NAME = "stagemesh-router"


class RouterTracing:
    """What makes spans in a router process.

    Args:
        settings: Of sampling and export.
        listen: The router's address, which tells it from others.
        model_name: As it is served.
        every_step: A span for each decode step of a request on each stage.
    """

    def __init__(self, settings: TraceSettings, *, listen: str, model_name: str, every_step: bool) -> None:
        from stagemesh.wire.telemetry.exporter import SpanExporter
        from stagemesh.wire.telemetry.resource import service_attributes

        attributes = service_attributes(SERVICE_NAME, version=version("stagemesh"), instance=listen)
        self._exporter = SpanExporter(settings, attributes)
        self.server = ServerSpans(self._exporter, model_name)
        self.steps = StepSpans(self._exporter, "lane-0")
        self.requests = RequestSpans(self._exporter, self.steps, every_step=every_step)

    @classmethod
    def start(cls, *, listen: str, model_name: str, every_step: bool) -> Self | None:
        """As the OTEL_* variables say; None where none are wanted. ConfigError names a wrong one."""
        settings = TraceSettings.read(os.environ)
        if settings is None:
            return None
        return cls(settings, listen=listen, model_name=model_name, every_step=every_step)

    @property
    def num_dropped(self) -> int:
        """Spans that were lost: they did not fit, or the receiver did not take them."""
        return self._exporter.num_dropped + sum(
            part.num_dropped for part in (self.server, self.requests, self.steps)
        )

    def announce(self) -> None:
        """Say where the spans go in the log."""
        self._exporter.announce()

    def close(self) -> None:
        """Send what there is; a receiver that does not answer delays it by two seconds at most."""
        self._exporter.close()
