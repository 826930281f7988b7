"""What the OTEL_* variables say of metrics that are pushed, checked at the start of a process.

Variables that the OTLP exporters read by themselves (headers, timeout, compression, certificates) are left to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from stagemesh.wire.errors import ConfigError
from stagemesh.wire.telemetry.variables import DEFAULT_ENDPOINTS, GRPC, Variables

EXPORTER_KEY = "OTEL_METRICS_EXPORTER"
OWN_ENDPOINT_KEY = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """Where metrics are pushed, and how often."""

    endpoint: str
    """Of the OTLP receiver."""
    protocol: str = GRPC
    """grpc or http/protobuf."""
    interval_s: float = 60.0
    """From one push to the next."""
    timeout_s: float = 30.0
    """Of one push."""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self | None:
        """None where no push is asked for, by OTEL_METRICS_EXPORTER or a receiver for metrics alone; ConfigError
        names a variable it cannot use.

        The address that all signals share asks for none: it is often that of a receiver of traces, which would
        refuse metrics.
        """
        value = Variables(environment)
        disabled = value.switch("OTEL_SDK_DISABLED")
        asked = value.text(EXPORTER_KEY) or ("otlp" if value.text(OWN_ENDPOINT_KEY) else "none")
        exporters = {name.strip().lower() for name in asked.split(",")}
        for name in sorted(exporters - {"otlp", "none"}):
            raise ConfigError(
                f"{EXPORTER_KEY}: '{name}' is not known; expected otlp or none (--metrics serves Prometheus)"
            )
        protocol = value.protocol("METRICS")
        endpoint = value.endpoint("METRICS", protocol)
        value.choice("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", ("cumulative",), "cumulative")
        explicit = "explicit_bucket_histogram"
        value.choice("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", (explicit,), explicit)
        value.resource()
        value.transport("METRICS")
        settings = cls(
            endpoint=endpoint or DEFAULT_ENDPOINTS[protocol],
            protocol=protocol,
            interval_s=value.seconds("OTEL_METRIC_EXPORT_INTERVAL", cls.interval_s),
            timeout_s=value.seconds("OTEL_METRIC_EXPORT_TIMEOUT", cls.timeout_s),
        )
        return settings if "otlp" in exporters and not disabled else None
