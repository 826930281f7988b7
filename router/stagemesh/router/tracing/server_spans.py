"""The router's span of a request: from its arrival to its end, by the GenAI conventions."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.router.api.stream import RequestStream
from stagemesh.router.scheduler import Finish
from stagemesh.router.tracing.request_trace import RequestTrace
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import StagemeshError
from stagemesh.wire.telemetry.buffer import Chunk, SpanBuffer
from stagemesh.wire.telemetry.context import TraceContext, new_span_id
from stagemesh.wire.telemetry.names import PROVIDER, Attribute, Span
from stagemesh.wire.telemetry.sampling import HeadSampler
from stagemesh.wire.telemetry.span_columns import (
    SERVER,
    SpanTemplate,
    TextAttribute,
    attribute,
    ids,
    parent_field,
    status,
)

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

REQUESTS_AT_ONCE = 512
"""Whose spans are made together."""
_INTEGERS = (
    Attribute.MAX_TOKENS,
    Attribute.TOP_K,
    Attribute.INPUT_TOKENS,
    Attribute.OUTPUT_TOKENS,
    Attribute.CACHED_TOKENS,
)
_FLOATS = (Attribute.TEMPERATURE, Attribute.TOP_P)
_FINISHES = {finish: attribute(Attribute.FINISH_REASONS, [finish.value]) for finish in Finish}


class ServerSpans:
    """Samples requests and gathers their spans.

    Args:
        exporter: Asks for the spans.
        model_name: As it is served.
    """

    def __init__(self, exporter: SpanExporter, model_name: str) -> None:
        self._settings = exporter.settings
        name = f"{Span.GENERATE} {model_name}"
        same = {
            Attribute.PROVIDER: PROVIDER,
            Attribute.MODEL: model_name,
            Attribute.RPC_SYSTEM: "grpc",
        }
        columns = {**dict.fromkeys(_INTEGERS, "int"), **dict.fromkeys(_FLOATS, "float")}
        self._template = SpanTemplate(name, attributes=same, columns=columns, kind=SERVER, root=True)  # type: ignore[arg-type]
        self._refusal = SpanTemplate(name, attributes=same, kind=SERVER, root=True)
        self._response_id = TextAttribute(Attribute.RESPONSE_ID)
        self._operation = TextAttribute(Attribute.OPERATION)
        self._sampler = HeadSampler(exporter.settings)
        self._ended: SpanBuffer[tuple[RequestTrace, RequestStream]] = SpanBuffer(
            self._settings.max_queued, exporter
        )
        self._refused: SpanBuffer[tuple[RequestTrace, StagemeshError, int]] = SpanBuffer(
            self._settings.max_queued, exporter
        )
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that did not fit."""
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
        # Prompts may be as long as they like; a chunk may not.
        ended, size = self._ended.take(), 1 if self._settings.capture_content else REQUESTS_AT_ONCE
        batches = (ended[begin : begin + size] for begin in range(0, len(ended), size))
        chunks = [(self._of_streams(batch, wall), len(batch)) for batch in batches]
        return chunks + [(self._of_refusal(*one, wall), 1) for one in self._refused.take()]

    def _of_streams(self, ended: list[tuple[RequestTrace, RequestStream]], wall: int) -> bytes:
        numbers, shares = [], []
        for trace, stream in ended:
            request, sampling = stream.request, stream.request.sampling
            numbers.append(
                (
                    *(trace.began_ns, int(stream.ended * 1e9)),
                    *(request.max_tokens, sampling.top_k, len(request.prompt)),
                    *(stream.num_tokens + len(stream.pending), stream.num_cached),
                )
            )
            shares.append((sampling.temperature, sampling.top_p))
        integers, floats = np.array(numbers, np.int64), np.array(shares)
        contexts = ids(b"".join(trace.context for trace, _ in ended), 24)
        return self._template.encode(
            trace_ids=contexts[:, :16],
            span_ids=contexts[:, 16:],
            starts_ns=integers[:, 0] + wall,
            ends_ns=integers[:, 1] + wall,
            columns={
                **dict(zip(_INTEGERS, integers.T[2:], strict=True)),
                **dict(zip(_FLOATS, floats.T, strict=True)),
            },
            tails=[self._tail(trace, stream) for trace, stream in ended],
        )

    def _tail(self, trace: RequestTrace, stream: RequestStream) -> bytes:
        """The fields that have no fixed size, or that not every span has."""
        tail = self._response_id.encode(stream.request.request_id) + self._operation.encode(trace.operation)
        tail += _priority(stream.request.priority) + _parent(trace)
        if stream.finish:
            tail += _FINISHES[stream.finish]
        if stream.first_token:
            tail += attribute(Attribute.TIME_TO_FIRST_CHUNK, stream.first_token - stream.arrived)
        if trace.prompt:
            tail += attribute(Attribute.INPUT_MESSAGES, trace.prompt)
        if error := stream.error:
            tail += attribute(Attribute.ERROR_TYPE, error.code.name) + status(error.message)
        return tail

    def _of_refusal(self, trace: RequestTrace, error: StagemeshError, ended_ns: int, wall: int) -> bytes:
        tail = self._response_id.encode(error.request_id) + self._operation.encode(trace.operation)
        tail += attribute(Attribute.ERROR_TYPE, error.code.name) + status(error.message) + _parent(trace)
        if trace.prompt:
            tail += attribute(Attribute.INPUT_MESSAGES, trace.prompt)
        contexts = ids(trace.context, 24)
        return self._refusal.encode(
            trace_ids=contexts[:, :16],
            span_ids=contexts[:, 16:],
            starts_ns=np.array([trace.began_ns + wall]),
            ends_ns=np.array([ended_ns + wall]),
            tails=[tail],
        )


@lru_cache(256)
def _priority(priority: int) -> bytes:
    return attribute(Attribute.PRIORITY, priority)


def _parent(trace: RequestTrace) -> bytes:
    return parent_field(trace.parent_id) if any(trace.parent_id) else b""


def _messages(message: inference_pb2.GenerateRequest) -> str:
    """The prompt in the shape of the conventions' gen_ai.input.messages; token ids stay out, they are no text."""
    chat = [(entry.role, entry.content) for entry in message.chat.messages]
    texts = chat or ([("user", message.text)] if message.text else [])
    entries = [{"role": role, "parts": [{"type": "text", "content": text}]} for role, text in texts]
    return json.dumps(entries, ensure_ascii=False) if entries else ""
