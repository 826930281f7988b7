"""Spans as bytes are what OpenTelemetry's own messages would be."""

from __future__ import annotations

import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans

from stagemesh.wire.telemetry.span_columns import (
    SERVER,
    SpanTemplate,
    TextAttribute,
    attribute,
    ids,
    link,
    parent_field,
    status,
)

TRACES = ids(bytes(range(48)), 16)
SPANS = ids(bytes(range(100, 124)), 8)
PARENTS = ids(bytes(range(200, 224)), 8)
STARTS = np.array([1, 1_795_571_585_678_934_925, 3])
ENDS = STARTS + 7


def test_a_batch_parses_as_the_spans_it_was_made_of() -> None:
    template = SpanTemplate(
        "stage",
        attributes={"text": "é", "flag": True, "ratio": 0.25, "many": ["a", "bc"], "below": -1},
        columns={"number": "int", "share": "float"},
    )
    numbers, shares = np.array([0, 127, (1 << 55) + 3]), np.array([0.0, -1.5, 1e300])
    data = template.encode(
        trace_ids=TRACES,
        span_ids=SPANS,
        parent_ids=PARENTS,
        starts_ns=STARTS,
        ends_ns=ENDS,
        columns={"number": numbers, "share": shares},
    )
    spans = ScopeSpans.FromString(data).spans
    assert [span.trace_id for span in spans] == [row.tobytes() for row in TRACES]
    assert [span.span_id for span in spans] == [row.tobytes() for row in SPANS]
    assert [span.parent_span_id for span in spans] == [row.tobytes() for row in PARENTS]
    assert [span.start_time_unix_nano for span in spans] == STARTS.tolist()
    assert [span.end_time_unix_nano for span in spans] == ENDS.tolist()
    for span, number, share in zip(spans, numbers, shares, strict=True):
        values = {entry.key: entry.value for entry in span.attributes}
        assert span.name == "stage"
        assert values["text"].string_value == "é"
        assert values["flag"].bool_value
        assert values["ratio"].double_value == 0.25
        assert [item.string_value for item in values["many"].array_value.values] == ["a", "bc"]
        assert values["below"].int_value == -1
        assert values["number"].int_value == number
        assert values["share"].double_value == share


def test_roots_have_no_parent_and_links_of_their_own() -> None:
    template = SpanTemplate("step", root=True)
    contexts = ids(bytes(range(48)), 24)
    made = [link(context.tobytes()) for context in contexts]
    links = [b"", made[0], b"".join(made)]
    data = template.encode(trace_ids=TRACES, span_ids=SPANS, starts_ns=STARTS, ends_ns=ENDS, tails=links)
    spans = ScopeSpans.FromString(data).spans
    assert [len(span.links) for span in spans] == [0, 1, 2]
    assert not any(span.parent_span_id for span in spans)
    assert [link.trace_id + link.span_id for link in spans[2].links] == [row.tobytes() for row in contexts]


def test_an_empty_batch_is_nothing() -> None:
    none = np.zeros(0, np.int64)
    template = SpanTemplate("step", root=True)
    assert template.encode(trace_ids=TRACES[:0], span_ids=SPANS[:0], starts_ns=none, ends_ns=none) == b""


def test_a_span_with_one_link_each() -> None:
    contexts = ids(bytes(range(72)), 24)
    template = SpanTemplate("prefill", columns={"number": "int"}, linked=True)
    data = template.encode(
        trace_ids=TRACES,
        span_ids=SPANS,
        parent_ids=PARENTS,
        starts_ns=STARTS,
        ends_ns=ENDS,
        links=contexts,
        columns={"number": np.arange(3)},
    )
    spans = ScopeSpans.FromString(data).spans
    assert [link.trace_id + link.span_id for span in spans for link in span.links] == [
        row.tobytes() for row in contexts
    ]
    assert [span.attributes[0].value.int_value for span in spans] == [0, 1, 2]


@pytest.mark.parametrize("length", [0, 3, 100, 119, 120, 127, 128, 20_000])
def test_a_text_of_any_length(length: int) -> None:
    key = TextAttribute("key")
    tails = [key.encode("é" * length), key.encode("e" * length), attribute("key", "e" * length)]
    data = SpanTemplate("s", root=True).encode(
        trace_ids=TRACES, span_ids=SPANS, starts_ns=STARTS, ends_ns=ENDS, tails=tails
    )
    spans = ScopeSpans.FromString(data).spans
    values = [(entry.key, entry.value.string_value) for span in spans for entry in span.attributes]
    assert values == [("key", "é" * length), ("key", "e" * length), ("key", "e" * length)]


@pytest.mark.parametrize("error", [None, "no lane"])
def test_what_some_spans_have_comes_at_their_end(error: str | None) -> None:
    template = SpanTemplate("generate m", kind=SERVER, root=True)
    tails = [b"", parent_field(PARENTS[0].tobytes()) + (status(error) if error else b""), b""]
    data = template.encode(trace_ids=TRACES, span_ids=SPANS, starts_ns=STARTS, ends_ns=ENDS, tails=tails)
    first, span, _ = ScopeSpans.FromString(data).spans
    assert (first.name, first.kind, first.parent_span_id) == ("generate m", 2, b"")
    assert span.parent_span_id == PARENTS[0].tobytes()
    assert (span.status.code, span.status.message) == ((2, error) if error else (0, ""))
