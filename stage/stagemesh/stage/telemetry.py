"""Telemetry of one stage process: where its spans go."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

from stagemesh.stage.config import StageConfig
from stagemesh.wire.telemetry.settings import TraceSettings

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter


def service_name(config: StageConfig) -> str:
    """A service each, so that a trace shows which stage a span is from; OTEL_SERVICE_NAME overrides it."""
    place = config.stage.partition("/")[0] if config.stage else (config.layers or "all").replace(":", "-")
    return f"stagemesh-stage-{place}"


def start_exporter(config: StageConfig) -> SpanExporter | None:
    """As the OTEL_* variables say; None where no receiver is named. ConfigError names a wrong one."""
    settings = TraceSettings.read(os.environ)
    if settings is None:
        return None
    from stagemesh.wire.telemetry.exporter import SpanExporter
    from stagemesh.wire.telemetry.resource import service_attributes

    return SpanExporter(
        settings,
        service_attributes(service_name(config), version=version("stagemesh"), instance=config.listen),
    )
