"""The client's span of a request, where the application uses OpenTelemetry; otherwise nothing.

The application's tracer provider makes the span, as a child of the application's current one, and the router and
the stages go on from it. The client needs no OpenTelemetry: an application that uses it has imported it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from stagemesh.client._types import Chunk
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.address import split_address
from stagemesh.wire.errors import StagemeshError
from stagemesh.wire.telemetry.context import TraceContext
from stagemesh.wire.telemetry.names import PROVIDER, SCOPE, Attribute, Span

_OPTIONS = {
    Attribute.MAX_TOKENS: "max_tokens",
    Attribute.TEMPERATURE: "temperature",
    Attribute.TOP_P: "top_p",
    Attribute.TOP_K: "top_k",
    Attribute.SEED: "seed",
}


class ClientSpan:
    """The span of one request, through all its attempts.

    Args:
        api: The module opentelemetry.trace.
        request: About to be sent; it gets the span's traceparent.
        address: Of the router.
    """

    def __init__(self, api: Any, request: pb.GenerateRequest, address: str) -> None:
        host, port = split_address(address, key="address")
        operation = "chat" if request.WhichOneof("prompt") == "chat" else "text_completion"
        attributes: dict[str, Any] = {
            Attribute.OPERATION: operation,
            Attribute.PROVIDER: PROVIDER,
            Attribute.SERVER_ADDRESS: host,
            Attribute.SERVER_PORT: port,
        }
        attributes |= {
            key: getattr(request, option) for key, option in _OPTIONS.items() if request.HasField(option)
        }
        self._api = api
        self._began = time.monotonic()
        self._span = api.get_tracer(SCOPE).start_span(
            Span.GENERATE, kind=api.SpanKind.CLIENT, attributes=attributes
        )
        self._first = False
        context = self._span.get_span_context()
        if context.is_valid:
            request.traceparent = TraceContext(
                context.trace_id.to_bytes(16, "big"),
                context.span_id.to_bytes(8, "big"),
                bool(context.trace_flags & api.TraceFlags.SAMPLED),
            ).header

    def took(self, chunk: Chunk) -> None:
        """Something came."""
        if not self._first:
            self._first = True
            self._span.set_attribute(Attribute.TIME_TO_FIRST_CHUNK, time.monotonic() - self._began)
        if chunk.finish_reason is not None:
            self._span.set_attribute(Attribute.FINISH_REASONS, [chunk.finish_reason.value])
        if chunk.usage is not None:
            self._span.set_attribute(Attribute.INPUT_TOKENS, chunk.usage.prompt_tokens)
            self._span.set_attribute(Attribute.OUTPUT_TOKENS, chunk.usage.completion_tokens)
            self._span.set_attribute(Attribute.CACHED_TOKENS, chunk.usage.cached_tokens)

    def end(self, request_id: str, error: StagemeshError | None = None) -> None:
        """Nothing more comes; the first call counts."""
        if not self._span.is_recording():
            return
        self._span.set_attribute(Attribute.RESPONSE_ID, request_id)
        if error is not None:
            self._span.set_attribute(Attribute.ERROR_TYPE, error.code.name)
            self._span.set_status(self._api.StatusCode.ERROR, error.message)
        self._span.end()


def start_span(request: pb.GenerateRequest, address: str) -> ClientSpan | None:
    """A span for a request that is about to be sent; None without OpenTelemetry, or with a traceparent given."""
    api = sys.modules.get("opentelemetry.trace")
    return None if api is None or request.traceparent else ClientSpan(api, request, address)
