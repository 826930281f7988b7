"""The router's span of a request: from its arrival to its end, by the GenAI conventions."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from stagemesh.router.api.stream import RequestStream
from stagemesh.router.tracing.request_trace import RequestTrace
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import StagemeshError
from stagemesh.wire.telemetry.buffer import Chunk, SpanBuffer, split
from stagemesh.wire.telemetry.context import TraceContext, new_span_id
from stagemesh.wire.telemetry.names import PROVIDER, Attribute, Span
from stagemesh.wire.telemetry.sampling import HeadSampler
from stagemesh.wire.telemetry.span_columns import SERVER, AttributeValue, one_span

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter


class ServerSpans:
    """Samples requests and gathers their spans.

    Args:
        exporter: Asks for the spans.
        model_name: As it is served.
    """

    def __init__(self, exporter: SpanExporter, model_name: str) -> None:
        self._settings = exporter.settings
        self._model_name = model_name
        self._sampler = HeadSampler(exporter.settings)
        self._ended: SpanBuffer[tuple[RequestTrace, RequestStream]] = SpanBuffer(self._settings.max_queued)
        self._refused: SpanBuffer[tuple[RequestTrace, StagemeshError, int]] = SpanBuffer(
            self._settings.max_queued
        )
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that did not fit while the receiver was away."""
        return self._ended.num_dropped + self._refused.num_dropped

    def begin(self, message: inference_pb2.GenerateRequest) -> RequestTrace | None:
        """A request came; None if it is not sampled."""
        parent = TraceContext.parse(message.traceparent) if message.traceparent else None
        trace_id = self._sampler.decide(parent)
        if trace_id is None:
            return None
        return RequestTrace(
            trace_id=trace_id,
            span_id=new_span_id(),
            parent_id=parent.span_id if parent else bytes(8),
            began_ns=time.monotonic_ns(),
            operation="chat" if message.WhichOneof("prompt") == "chat" else "text_completion",
            prompt=_messages(message) if self._settings.capture_content else "",
        )

    def end(self, trace: RequestTrace, stream: RequestStream) -> None:
        """The request has ended, well or not."""
        self._ended.add((trace, stream))

    def refuse(self, trace: RequestTrace, error: StagemeshError) -> None:
        """The request was not taken."""
        self._refused.add((trace, error, time.monotonic_ns()))

    def _spans(self) -> list[Chunk]:
        wall = time.time_ns() - time.monotonic_ns()
        spans = [self._of_stream(trace, stream, wall) for trace, stream in self._ended.take()]
        spans += [
            self._span(trace, ended_ns + wall, wall, {Attribute.RESPONSE_ID: error.request_id}, error)
            for trace, error, ended_ns in self._refused.take()
        ]
        return split(spans, self._settings.max_batch)

    def _of_stream(self, trace: RequestTrace, stream: RequestStream, wall: int) -> bytes:
        request = stream.request
        sampling = request.sampling
        attributes: dict[str, AttributeValue] = {
            Attribute.RESPONSE_ID: request.request_id,
            Attribute.MAX_TOKENS: request.max_tokens,
            Attribute.TEMPERATURE: float(sampling.temperature),
            Attribute.TOP_P: float(sampling.top_p),
            Attribute.TOP_K: sampling.top_k,
            Attribute.INPUT_TOKENS: len(request.prompt),
            Attribute.OUTPUT_TOKENS: stream.num_tokens + len(stream.pending),
            Attribute.CACHED_TOKENS: stream.num_cached,
            Attribute.PRIORITY: request.priority,
        }
        if stream.finish:
            attributes[Attribute.FINISH_REASONS] = [stream.finish.value]
        if stream.first_token:
            attributes[Attribute.TIME_TO_FIRST_CHUNK] = stream.first_token - stream.arrived
        return self._span(trace, int(stream.ended * 1e9) + wall, wall, attributes, stream.error)

    def _span(
        self,
        trace: RequestTrace,
        end_ns: int,
        wall: int,
        attributes: dict[str, AttributeValue],
        error: StagemeshError | None,
    ) -> bytes:
        attributes |= {
            Attribute.OPERATION: trace.operation,
            Attribute.PROVIDER: PROVIDER,
            Attribute.MODEL: self._model_name,
            Attribute.RPC_SYSTEM: "grpc",
        }
        if trace.prompt:
            attributes[Attribute.INPUT_MESSAGES] = trace.prompt
        if error:
            attributes[Attribute.ERROR_TYPE] = error.code.name
        return one_span(
            f"{Span.GENERATE} {self._model_name}",
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            parent_id=trace.parent_id,
            start_ns=trace.began_ns + wall,
            end_ns=end_ns,
            attributes=attributes,
            kind=SERVER,
            error=error.message if error else None,
        )


def _messages(message: inference_pb2.GenerateRequest) -> str:
    """The prompt in the shape of the conventions' gen_ai.input.messages; token ids stay out, they are no text."""
    chat = [(entry.role, entry.content) for entry in message.chat.messages]
    texts = chat or ([("user", message.text)] if message.text else [])
    entries = [{"role": role, "parts": [{"type": "text", "content": text}]} for role, text in texts]
    return json.dumps(entries, ensure_ascii=False) if entries else ""
