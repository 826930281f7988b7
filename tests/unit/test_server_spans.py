"""What the router's span of a request says, and what it keeps to itself."""

from __future__ import annotations

from typing import Any

import pytest
from exporter_for_tests import Exporter

from stagemesh.router.tracing.server_spans import ServerSpans
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import UnavailableError
from stagemesh.wire.telemetry.names import Attribute

SECRET = "a word that is nobody's business"


def refused(exporter: Exporter, message: inference_pb2.GenerateRequest) -> dict[str, Any]:
    """Attributes of the span of a request that was refused."""
    spans = ServerSpans(exporter, "m")  # type: ignore[arg-type]
    trace = spans.begin(message)
    assert trace is not None
    spans.refuse(trace, UnavailableError("no lane", request_id="r"))
    (span,) = exporter.spans()
    assert (span.name, span.status.code, span.status.message) == ("generate m", 2, "no lane")
    return {entry.key: entry.value for entry in span.attributes}


CHAT = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="system", content=SECRET)])
MESSAGES = [inference_pb2.GenerateRequest(text=SECRET), inference_pb2.GenerateRequest(chat=CHAT)]


@pytest.mark.parametrize("message", MESSAGES, ids=["text", "chat"])
def test_a_prompt_is_in_a_span_only_where_that_is_switched_on(message: inference_pb2.GenerateRequest) -> None:
    exporter = Exporter()
    refused(exporter, message)
    silent = ServerSpans(exporter, "m")  # type: ignore[arg-type]
    trace = silent.begin(message)
    assert trace is not None
    silent.refuse(trace, UnavailableError("no lane"))
    assert SECRET.encode() not in b"".join(span.SerializeToString() for span in exporter.spans())
    attributes = refused(Exporter(capture_content=True), message)
    assert SECRET in attributes[Attribute.INPUT_MESSAGES].string_value


def test_what_is_not_sampled_leaves_nothing() -> None:
    exporter = Exporter(sampler="always_off")
    assert ServerSpans(exporter, "m").begin(MESSAGES[0]) is None  # type: ignore[arg-type]
    assert exporter.spans() == []


def test_spans_beyond_the_limit_are_dropped_and_counted() -> None:
    exporter = Exporter(max_queued=2)
    spans = ServerSpans(exporter, "m")  # type: ignore[arg-type]
    for _ in range(5):
        trace = spans.begin(MESSAGES[0])
        assert trace is not None
        spans.refuse(trace, UnavailableError("no lane"))
    assert spans.num_dropped == 3
    assert len(exporter.spans()) == 2
