"""What the OTEL_* variables say of metrics, and that a wrong one is named."""

from __future__ import annotations

import pytest

from stagemesh.wire.errors import ConfigError
from stagemesh.wire.telemetry.metric_settings import MetricSettings

ON = {"OTEL_METRICS_EXPORTER": "otlp"}
HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        HERE,
        {**HERE, "OTEL_METRICS_EXPORTER": "none"},
        {**HERE, "OTEL_METRICS_EXPORTER": ""},
        {**HERE, **ON, "OTEL_SDK_DISABLED": "true"},
        {"OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4317"},
    ],
)
def test_nothing_is_pushed_unless_it_is_asked_for(environment: dict[str, str]) -> None:
    """A receiver of traces is not asked to take metrics too."""
    assert MetricSettings.read(environment) is None


def test_a_receiver_of_its_own_asks_for_it() -> None:
    settings = MetricSettings.read({**HERE, "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://metrics:4317"})
    assert settings == MetricSettings(endpoint="http://metrics:4317")


@pytest.mark.parametrize(
    ("protocol", "endpoint"), [("grpc", "http://localhost:4317"), ("http/protobuf", "http://localhost:4318")]
)
def test_without_an_address_it_is_the_usual_one(protocol: str, endpoint: str) -> None:
    settings = MetricSettings.read({**ON, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": protocol})
    assert settings == MetricSettings(endpoint=endpoint, protocol=protocol)


def test_the_variables_are_read() -> None:
    times = {"OTEL_METRIC_EXPORT_INTERVAL": "10000", "OTEL_METRIC_EXPORT_TIMEOUT": "5000"}
    assert MetricSettings.read({**ON, **HERE, **times}) == MetricSettings(
        endpoint=HERE["OTEL_EXPORTER_OTLP_ENDPOINT"], interval_s=10.0, timeout_s=5.0
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("OTEL_METRICS_EXPORTER", "console"),
        ("OTEL_METRICS_EXPORTER", "otlp,prometheus"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "collector"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta"),
        ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "base2_exponential_bucket_histogram"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "1e300"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "zip"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "a=b,=c"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "junk"),
        ("OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE", "/no/such/file"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment"),
        ("OTEL_SDK_DISABLED", "perhaps"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        MetricSettings.read({**ON, **HERE, key: value})
