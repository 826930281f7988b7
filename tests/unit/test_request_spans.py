"""A request's spans inside the mesh, worked out for many requests at once from what the stages reported."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exporter_for_tests import Exporter
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans
from scheduled_lane import make_request

from stagemesh.router.api.live_request import LiveRequest
from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.lane.timings import COLUMNS, StageTimings
from stagemesh.router.tracing import request_spans
from stagemesh.router.tracing.request_spans import RequestSpans
from stagemesh.router.tracing.step_spans import StepSpans
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, pack
from stagemesh.wire.telemetry.names import PART_MS, Attribute, Span

PORT: Any = SimpleNamespace(index=0)
PARTS_NS = (100, 2_000, 30_000, 400_000, 5_000)
MS = 1e6


class Mesh:
    """Two stages that have reported steps 1 to `last`, each a microsecond apart."""

    def __init__(self, last: int = 20, *, every_step: bool = False) -> None:
        self.exporter = Exporter()
        self.steps = StepSpans(self.exporter, "lane-0")  # type: ignore[arg-type]
        self.steps.open_lane(5, StepRecords())
        self.requests = RequestSpans(self.exporter, self.steps, every_step=every_step)  # type: ignore[arg-type]
        self.stages = [self._stage(index, last) for index in range(2)]
        self.requests.stages = self.stages

    def _stage(self, index: int, last: int) -> Any:
        timings, numbers = StageTimings(), np.arange(1, last + 1)
        columns = {f"{name}_ns": pack(np.full(last, PARTS_NS[at]), U64) for at, name in enumerate(COLUMNS)}
        timings.add(
            stage_pb2.StageReport(
                numbers=pack(numbers, U64),
                arrival_ns=pack(10**9 + 1_000 * numbers + 7 * index, U64),
                **columns,
            )
        )
        return SimpleNamespace(index=index, timings=timings, clock=SimpleNamespace(offset_ns=7 * index))

    def end(self, name: int, prefill: list[int], decode: list[int]) -> None:
        request = make_request(str(name))
        object.__setattr__(request, "trace", bytes([name]) * 24)
        live = LiveRequest(request=request, port=PORT, handle=1, arrived=1.0, admitted=1.25, ended=3.0)
        self.requests.add(live, np.array(prefill, np.int64), np.array(decode, np.int64))

    def spans(self) -> list[Any]:
        chunks = self.exporter.sources[1]()
        found = [span for data, _ in chunks for span in ScopeSpans.FromString(data).spans]
        assert len(found) == sum(count for _, count in chunks)
        return found


def values(span: Any) -> dict[str, float]:
    return {e.key: getattr(e.value, e.value.WhichOneof("value")) for e in span.attributes}


def test_queue_chunks_and_decodes_of_requests_that_ended_together() -> None:
    mesh = Mesh()
    mesh.end(1, [1, 2], [4, 5, 7])
    mesh.end(2, [3], [])
    mesh.end(3, [], [])
    mesh.end(4, [5], [6])
    spans = mesh.spans()
    names = {n: Counter(s.name for s in spans if s.trace_id == bytes([n]) * 16) for n in (1, 2, 3, 4)}
    assert names[1] == {Span.QUEUE: 1, Span.PREFILL: 4, Span.DECODE: 2}
    assert names[2] == {Span.QUEUE: 1, Span.PREFILL: 2}
    assert names[3] == {Span.QUEUE: 1}
    assert names[4] == {Span.QUEUE: 1, Span.PREFILL: 2, Span.DECODE: 2}
    assert all(span.parent_span_id == span.trace_id[:8] for span in spans)
    wall = next(s for s in spans if s.name == Span.QUEUE).start_time_unix_nano - 10**9
    for span in spans:
        if span.name == Span.QUEUE:
            assert span.end_time_unix_nano - span.start_time_unix_nano == 250 * MS
        elif span.name == Span.PREFILL:
            number = int(values(span)[Attribute.STEP])
            begin = wall + 10**9 + 1_000 * number + sum(PARTS_NS[:2])
            assert (span.start_time_unix_nano, span.end_time_unix_nano) == (begin, begin + sum(PARTS_NS[2:]))
            assert [values(span)[key] for key in PART_MS] == [part / MS for part in PARTS_NS]
            (link,) = span.links
            assert link.trace_id + link.span_id == mesh.steps.ids.of(np.array([number])).tobytes()
    decodes = [s for s in spans if s.name == Span.DECODE and s.trace_id[0] == 1]
    assert [values(s)[Attribute.STAGE] for s in decodes] == [0, 1]
    for decode in decodes:
        assert values(decode)[Attribute.STEPS] == 3
        assert [values(decode)[key] for key in PART_MS] == pytest.approx([3 * part / MS for part in PARTS_NS])
        begin = wall + 10**9 + 4_000 + sum(PARTS_NS[:2])
        assert decode.start_time_unix_nano == begin
        assert decode.end_time_unix_nano == begin + 3_000 + sum(PARTS_NS[2:])


def test_a_span_for_each_decode_step_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_spans, "SPANS_AT_ONCE", 3)
    mesh = Mesh(every_step=True)
    mesh.end(1, [1], [2, 3, 4])
    mesh.end(2, [1], [4, 6])
    spans = mesh.spans()
    for decode in (s for s in spans if s.name == Span.DECODE):
        children = [s for s in spans if s.parent_span_id == decode.span_id]
        assert {s.name for s in children} == {Span.DECODE_STEP}
        numbers = [values(s)[Attribute.STEP] for s in children]
        assert numbers == ([2, 3, 4] if decode.trace_id[0] == 1 else [4, 6])
        assert {values(s)[Attribute.STAGE] for s in children} == {values(decode)[Attribute.STAGE]}


def test_what_a_stage_has_not_reported_is_missing_and_no_more() -> None:
    mesh = Mesh(last=3)
    mesh.stages[1].timings.clear()
    mesh.end(1, [1], [2, 3, 4])
    found = {(s.name, values(s).get(Attribute.STAGE), values(s).get(Attribute.STEPS)) for s in mesh.spans()}
    assert found == {(Span.QUEUE, None, None), (Span.PREFILL, 0, None), (Span.DECODE, 0, 2)}


def test_requests_of_an_epoch_that_ended_keep_its_times_and_its_steps() -> None:
    mesh = Mesh()
    mesh.end(1, [1], [2])
    number_1 = mesh.steps.ids.of(np.array([1])).tobytes()
    mesh.requests.close_lane()
    for stage in mesh.stages:
        stage.timings.clear()
    mesh.steps.open_lane(6, StepRecords())
    spans = mesh.spans()
    assert Counter(s.name for s in spans) == {Span.QUEUE: 1, Span.PREFILL: 2, Span.DECODE: 2}
    assert {link.trace_id + link.span_id for s in spans for link in s.links} == {number_1}
    assert mesh.spans() == []
