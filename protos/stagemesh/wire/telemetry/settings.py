"""What the OTEL_* variables say of traces, checked at the start of a process.

Variables that the OTLP exporters read by themselves (headers, timeout, compression, certificates) are left to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError

GRPC = "grpc"
HTTP = "http/protobuf"
SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
CONTENT_KEY = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "no_content", "")


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
    export_timeout_s: float = 10.0
    max_queued: int = 1 << 16
    """Spans kept while the receiver does not take them; what comes beyond is dropped and counted."""
    max_batch: int = 2048
    """Spans of one export at most."""
    max_links: int = 128
    """Links of a span at most."""
    capture_content: bool = False
    """Whether prompts go into spans."""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self | None:
        """None where no receiver is configured, or tracing is off; ConfigError names a variable it cannot use."""
        value = _Reader(environment)
        disabled = value.switch("OTEL_SDK_DISABLED")
        exporter = value.choice("OTEL_TRACES_EXPORTER", ("otlp", "none"), "otlp")
        protocol = value.first_choice(
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"), (GRPC, HTTP), GRPC
        )
        endpoint = value.endpoint(protocol)
        sampler = value.choice("OTEL_TRACES_SAMPLER", SAMPLERS, cls.sampler)
        ratio = value.number("OTEL_TRACES_SAMPLER_ARG", cls.ratio, low=0, high=1)
        value.resource()
        settings = cls(
            endpoint=endpoint,
            protocol=protocol,
            sampler=sampler,
            ratio=ratio,
            delay_s=value.number("OTEL_BSP_SCHEDULE_DELAY", cls.delay_s * 1e3, low=1) / 1e3,
            export_timeout_s=value.number("OTEL_EXPORTER_OTLP_TIMEOUT", cls.export_timeout_s, low=0.001),
            max_queued=int(value.number("OTEL_BSP_MAX_QUEUE_SIZE", cls.max_queued, low=1)),
            max_batch=int(value.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", cls.max_batch, low=1)),
            max_links=int(value.number("OTEL_SPAN_LINK_COUNT_LIMIT", cls.max_links, low=1)),
            capture_content=value.switch(CONTENT_KEY, also_true=("span_only", "span_and_event")),
        )
        return settings if endpoint and exporter == "otlp" and not disabled else None


class _Reader:
    """One variable at a time; an empty one counts as unset, as the specification says."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, key: str) -> str:
        return self._environment.get(key, "").strip()

    def switch(self, key: str, also_true: tuple[str, ...] = ()) -> bool:
        text = self.text(key).lower()
        if text not in (*_TRUE, *_FALSE, *also_true):
            raise ConfigError(f"{key}: '{text}' is neither true nor false")
        return text in (*_TRUE, *also_true)

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        text = self.text(key).lower() or default
        if text not in choices:
            raise ConfigError(f"{key}: '{text}' is not known; expected one of {', '.join(choices)}")
        return text

    def first_choice(self, keys: tuple[str, ...], choices: tuple[str, ...], default: str) -> str:
        key = next((key for key in keys if self.text(key)), keys[-1])
        return self.choice(key, choices, default)

    def number(self, key: str, default: float, *, low: float, high: float = float("inf")) -> float:
        text = self.text(key)
        try:
            value = float(text) if text else default
        except ValueError:
            raise ConfigError(f"{key}: '{text}' is not a number") from None
        if not low <= value <= high:
            upper = f" to {high:g}" if high < float("inf") else " or more"
            raise ConfigError(f"{key}: {text} is out of range; expected {low:g}{upper}")
        return value

    def endpoint(self, protocol: str) -> str:
        traces, every = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
        key = traces if self.text(traces) else every
        text = self.text(key)
        if not text:
            return ""
        wanted = "http://HOST:PORT or https://HOST:PORT"
        if protocol == GRPC and "://" not in text:
            split_address(text, key=key)
            return text
        try:
            parts = urlsplit(text)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"{key}: '{text}' is not an address; expected {wanted}")
        if protocol == GRPC and parts.port is None:
            raise ConfigError(f"{key}: '{text}' has no port; expected {wanted}, the usual port is 4317")
        return text

    def resource(self) -> None:
        text = self.text("OTEL_RESOURCE_ATTRIBUTES")
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, equals, _ = item.partition("=")
            if not equals or not key.strip():
                raise ConfigError(f"OTEL_RESOURCE_ATTRIBUTES: '{item}' is not KEY=VALUE")
