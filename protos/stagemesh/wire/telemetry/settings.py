"""What the OTEL_* variables say of traces, checked at the start of a process.

Variables that the OTLP exporters read by themselves (headers, timeout, compression, certificates) are left to them, the
first three checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from stagemesh.wire.telemetry.names import SPANS_OF_A_STEP
from stagemesh.wire.telemetry.variables import DEFAULT_ENDPOINTS, GRPC, Variables

SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
CONTENT_KEY = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """How spans are sampled and where they go."""

    endpoint: str
    """Of the OTLP receiver."""
    protocol: str = GRPC
    """grpc or http/protobuf."""
    sampler: str = "parentbased_always_on"
    ratio: float = 1.0
    """Of the traceidratio samplers."""
    delay_s: float = 5.0
    """Between two exports."""
    max_queued: int = 1 << 16
    """Spans kept until they are sent, those of one step at least; what comes beyond is dropped and counted."""
    max_batch: int = 1 << 14
    """Spans of one export at most; MAX_REQUEST_BYTES bounds it too."""
    max_links: int = 128
    """Links of a span at most."""
    capture_content: bool = False
    """Whether prompts go into spans."""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self | None:
        """None where neither a receiver nor OTEL_TRACES_EXPORTER=otlp is set, or tracing is off; ConfigError names a
        variable it cannot use."""
        value = Variables(environment)
        disabled = value.switch("OTEL_SDK_DISABLED")
        exporter = value.choice("OTEL_TRACES_EXPORTER", ("otlp", "none"), "otlp")
        protocol = value.protocol("TRACES")
        endpoint = value.endpoint("TRACES", protocol)
        if value.text("OTEL_TRACES_EXPORTER") and not endpoint:
            endpoint = DEFAULT_ENDPOINTS[protocol]
        sampler = value.choice("OTEL_TRACES_SAMPLER", SAMPLERS, cls.sampler)
        ratio = value.number("OTEL_TRACES_SAMPLER_ARG", cls.ratio, low=0, high=1)
        value.resource()
        value.transport("TRACES")
        settings = cls(
            endpoint=endpoint,
            protocol=protocol,
            sampler=sampler,
            ratio=ratio,
            delay_s=value.seconds("OTEL_BSP_SCHEDULE_DELAY", cls.delay_s),
            max_queued=int(value.number("OTEL_BSP_MAX_QUEUE_SIZE", cls.max_queued, low=SPANS_OF_A_STEP)),
            max_batch=int(value.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", cls.max_batch, low=1)),
            max_links=int(value.number("OTEL_SPAN_LINK_COUNT_LIMIT", cls.max_links, low=1)),
            capture_content=value.switch(CONTENT_KEY, also_true=("span_only", "span_and_event")),
        )
        return settings if endpoint and exporter == "otlp" and not disabled else None
