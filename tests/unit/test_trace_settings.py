"""What the OTEL_* variables switch on, and that a wrong one is named."""

from __future__ import annotations

import logging
from typing import Any

import certifi
import pytest

from stagemesh.wire.errors import ConfigError
from stagemesh.wire.telemetry.context import TraceContext
from stagemesh.wire.telemetry.metric_settings import MetricSettings
from stagemesh.wire.telemetry.names import Attribute, Metric, RouterMetric, StageMetric, metrics_of
from stagemesh.wire.telemetry.sampling import HeadSampler
from stagemesh.wire.telemetry.settings import TraceSettings

HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {**HERE, "OTEL_SDK_DISABLED": "true"},
        {**HERE, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_a_receiver_or_switched_off_there_is_no_tracing(environment: dict[str, str]) -> None:
    assert TraceSettings.read(environment) is None


def test_the_variables_are_read() -> None:
    settings = TraceSettings.read(
        {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector.example:4318/x",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.25",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20x=, x-tenant = mesh,",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": certifi.where(),
            "OTEL_EXPORTER_OTLP_CLIENT_KEY": __file__,
            "OTEL_BSP_SCHEDULE_DELAY": "250",
            "OTEL_SPAN_LINK_COUNT_LIMIT": "3",
            "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "true",
        }
    )
    assert settings == TraceSettings(
        endpoint="https://collector.example:4318/x",
        protocol="http/protobuf",
        sampler="parentbased_traceidratio",
        ratio=0.25,
        delay_s=0.25,
        max_links=3,
        capture_content=True,
    )


@pytest.mark.parametrize(
    ("protocol", "endpoint"), [("grpc", "http://localhost:4317"), ("http/protobuf", "http://localhost:4318")]
)
def test_traces_that_are_asked_for_without_an_address_go_to_the_usual_one(
    protocol: str, endpoint: str
) -> None:
    environment = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    assert TraceSettings.read(environment) == TraceSettings(endpoint=endpoint, protocol=protocol)


@pytest.mark.parametrize(
    "header",
    [
        "x-key=hush;def",
        'x-key="hush"',
        "x-key=hush\u00e9",
        "x-key=hush%C3%A9",
        "x-key=hush%0Adef",
        "My Key=hush",
        "my%20key=hush",
        "x-key-bin=hush",
        "x-key:hush",
    ],
)
@pytest.mark.parametrize("signal", ["", "TRACES_", "METRICS_"])
def test_a_header_that_cannot_be_sent_is_refused_without_a_word_of_its_value(
    signal: str, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"OTEL_EXPORTER_OTLP_{signal}HEADERS"
    settings: Any = MetricSettings if signal == "METRICS_" else TraceSettings
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError, match=f"^{key}: ") as refused:
        settings.read({**HERE, key: f"authorization=Bearer%20x=,{header}"})
    assert "hush" not in str(refused.value) + caplog.text
    assert not logging.getLogger("opentelemetry.util.re").disabled


def test_headers_are_those_that_the_exporters_send() -> None:
    """A blank, an equals sign and no value at all are fine, and so is any case of a name."""
    headers = "Authorization=Basic dTpw==, X-Scope.Org_1=%5Ba%2Cb%5D,x-empty=,"
    assert TraceSettings.read({**HERE, "OTEL_EXPORTER_OTLP_HEADERS": headers})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:port"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1e300"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "zip"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "junk"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=b,=c"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file"),
        ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", __file__),
        ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", "/no/such/file"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/no/such/file"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("OTEL_TRACES_SAMPLER_ARG", "half"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment"),
        ("OTEL_SDK_DISABLED", "perhaps"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "inf"),
        ("OTEL_BSP_SCHEDULE_DELAY", "1e300"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "inf"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "5"),
        ("OTEL_TRACES_SAMPLER_ARG", "nan"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        TraceSettings.read({**HERE, key: value})


@pytest.mark.parametrize(
    "header",
    [
        "",
        "junk",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
    ],
)
def test_a_malformed_traceparent_is_none(header: str) -> None:
    assert TraceContext.parse(header) is None


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("03", True)])
def test_a_traceparent_is_read_and_written(flags: str, sampled: bool) -> None:
    context = TraceContext.parse(f"00-{TRACE}-{SPAN}-{flags}")
    assert context == TraceContext(bytes.fromhex(TRACE), bytes.fromhex(SPAN), sampled)
    assert context.header == f"00-{TRACE}-{SPAN}-0{int(sampled)}"
    assert TraceContext.parse(f"cc-{TRACE}-{SPAN}-{flags}-later") == context, "a later version may say more"


def sampler(name: str, ratio: float = 1.0) -> HeadSampler:
    return HeadSampler(TraceSettings(endpoint="x:1", sampler=name, ratio=ratio))


def test_a_parent_decides_for_a_parent_based_sampler_alone() -> None:
    yes, no = (TraceContext(bytes.fromhex(TRACE), bytes.fromhex(SPAN), sampled) for sampled in (True, False))
    assert sampler("parentbased_always_off").decide(yes) == yes.trace_id
    assert sampler("parentbased_always_on").decide(no) is None
    assert sampler("always_on").decide(no) == no.trace_id
    assert sampler("always_off").decide(yes) is None
    assert sampler("parentbased_always_off").decide(None) is None


def test_a_ratio_samples_that_share_and_decides_as_the_sdk_does() -> None:
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    ours, theirs = sampler("parentbased_traceidratio", 0.25), TraceIdRatioBased(0.25)
    assert 150 < sum(ours.decide(None) is not None for _ in range(1000)) < 350
    for seed in range(64):
        trace_id = (seed << 58 | seed + 1).to_bytes(16, "big")
        parent = TraceContext(trace_id, bytes.fromhex(SPAN), False)
        alone = sampler("traceidratio", 0.25).decide(parent) is not None
        assert alone is theirs.should_sample(None, int.from_bytes(trace_id, "big"), "x").decision.is_sampled()


def test_names_of_the_genai_conventions_are_those_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, openai_attributes  # noqa: F401
    from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI")}
    known |= {value for name, value in vars(gen_ai_metrics).items() if name.startswith("GEN_AI")}
    ours = [value for name, value in vars(Attribute).items() if not name.startswith("_")]
    ours += [metric.name for metric in (*metrics_of(RouterMetric), *metrics_of(StageMetric))]
    # The seed is newer in the conventions than the package's Python names.
    assert {name for name in ours if name.startswith("gen_ai.")} <= known | {"gen_ai.request.seed"}


def test_every_metric_has_a_name_of_its_own_in_prometheus() -> None:
    for group in (RouterMetric, StageMetric):
        metrics = metrics_of(group)
        assert len({metric.prometheus for metric in metrics}) == len(metrics)
        for metric in metrics:
            assert bool(metric.buckets) is (metric.kind == "histogram")
            assert list(metric.buckets) == sorted(set(metric.buckets))
    assert Metric(name="a.b", kind="counter", unit="By", description="").prometheus == "a_b_bytes_total"
