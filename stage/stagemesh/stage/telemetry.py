"""Telemetry of one stage process: where its spans and its metrics go.

OpenTelemetry is loaded where one of them is configured, and not otherwise.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

from stagemesh.stage.config import StageConfig
from stagemesh.stage.leader.leader import StageLeader
from stagemesh.stage.leader.step_spans import StepSpans
from stagemesh.wire.telemetry.metric_settings import MetricSettings
from stagemesh.wire.telemetry.settings import TraceSettings

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter
    from stagemesh.wire.telemetry.metrics_output import MetricsOutput


def stage_label(config: StageConfig) -> str:
    """The stage's index, or the layers that name it where it was not told its place."""
    return config.stage.partition("/")[0] if config.stage else (config.layers or "all").replace(":", "-")


def service_name(config: StageConfig) -> str:
    """A service each, so that a trace shows which stage a span is from; OTEL_SERVICE_NAME overrides it."""
    return f"stagemesh-stage-{stage_label(config)}"


def start_exporter(config: StageConfig) -> SpanExporter | None:
    """As the OTEL_* variables say; None where no spans are wanted. ConfigError names a wrong one."""
    settings = TraceSettings.read(os.environ)
    if settings is None:
        return None
    from stagemesh.wire.telemetry.exporter import SpanExporter
    from stagemesh.wire.telemetry.resource import service_attributes

    return SpanExporter(
        settings,
        service_attributes(service_name(config), version=version("stagemesh"), instance=config.listen),
    )


def open_metrics(
    config: StageConfig,
    leader: StageLeader,
    num_blocks: int,
    exporter: SpanExporter | None,
    spans: StepSpans | None,
    pushed: MetricSettings | None,
) -> MetricsOutput | None:
    """Of a leader that keeps stats, as --metrics and the OTEL_* variables say; None where nobody wants them.
    ConfigError if the endpoint cannot listen."""
    if leader.stats is None:
        return None
    from stagemesh.stage.metrics import StageMetrics
    from stagemesh.wire.telemetry.metrics_output import MetricsOutput

    metrics = StageMetrics(
        leader.stats,
        stage=stage_label(config),
        service=service_name(config),
        listen=config.listen,
        num_blocks=num_blocks,
        not_ready=lambda: leader.not_ready,
        num_dropped=lambda: (exporter.num_dropped if exporter else 0) + (spans.num_dropped if spans else 0),
        pushed=pushed,
    )
    return MetricsOutput(metrics, config.metrics, insecure=config.insecure, pushed=pushed)
