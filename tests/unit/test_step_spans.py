"""Roots of the traces of microbatches: which steps have one, and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from exporter_for_tests import Exporter, Intruder

from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.lane.timings import STEPS_KEPT
from stagemesh.router.scheduler import Request, Step
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.scheduler.step import Changes
from stagemesh.router.tracing import step_spans
from stagemesh.router.tracing.step_spans import StepIds, StepSpans
from stagemesh.wire.telemetry.context import TraceContext
from stagemesh.wire.telemetry.names import Attribute


class Lane:
    """As the lane calls it."""

    def __init__(self, **settings: Any) -> None:
        self.exporter = Exporter(**settings)
        self.spans = StepSpans(self.exporter, "lane-0")  # type: ignore[arg-type]
        self.records = StepRecords()
        self.open(5)

    def open(self, epoch: int) -> None:
        self.spans.open_lane(epoch, self.records)
        self.records.clear()

    def send(
        self,
        number: int,
        slots: list[int],
        admitted: list[Sequence] | None = None,
        released: list[int] | None = None,
    ) -> str:
        count = len(slots)
        step = Step(
            number=number,
            changes=Changes(admitted=admitted or [], released=released or []),
            slots=np.array(slots),
            counts=np.ones(count, np.int64),
            input_steps=np.ones(count, np.uint64),
            tokens=[],
            sample=np.ones(count, np.bool_),
            sequences=np.empty(count, object),
            tenancies=np.zeros(count, np.int64),
            num_decodes=count,
            newest_input=1,
        )
        traceparent = self.spans.step_sent(step)
        self.records.sent(step, 1_000 * number)
        return traceparent

    def answer(self, number: int) -> None:
        self.records.done(number, 1_000 * number + 500)


def sequence(slot: int, trace: bytes = b"") -> Sequence:
    request = Request(request_id=str(slot), prompt=np.ones(1, np.uint32), max_tokens=1, trace=trace)
    made = Sequence(request, order=slot)
    made.slot = slot
    return made


TRACES = [bytes([index + 1]) * 24 for index in range(3)]


def test_a_step_has_a_trace_when_a_sampled_request_is_in_it() -> None:
    lane = Lane()
    traced = [sequence(index, TRACES[index]) for index in range(2)]
    first = lane.send(1, [0, 1, 2], [*traced, sequence(2)])
    assert lane.send(2, [2]) == ""
    third = lane.send(3, [1, 2])
    for number in (1, 2, 3):
        lane.answer(number)
    spans = lane.exporter.spans()
    for span, header, number, links in zip(
        spans, (first, third), (1, 3), (TRACES[:2], TRACES[1:2]), strict=True
    ):
        context = TraceContext.parse(header)
        assert context == TraceContext(span.trace_id, span.span_id, True)
        assert [link.trace_id + link.span_id for link in span.links] == links
        values = {entry.key: entry.value.int_value for entry in span.attributes}
        assert (values[Attribute.STEP], values[Attribute.EPOCH]) == (number, 5)
        assert (values[Attribute.ROWS], values[Attribute.PREFILL_TOKENS]) == (len(links) + 1, 0)
        assert span.end_time_unix_nano - span.start_time_unix_nano == 500
        assert lane.spans.ids.of(np.array([number])).tobytes() == span.trace_id + span.span_id
    assert lane.exporter.spans() == [], "given away twice"


def test_a_slot_is_traced_for_as_long_as_its_sequence_has_it() -> None:
    lane = Lane()
    assert lane.send(1, [0], [sequence(0, TRACES[0])])
    assert lane.send(2, [0], [sequence(0)]) == ""
    assert lane.send(3, [0], [sequence(0, TRACES[1])])


def test_steps_of_an_epoch_that_ended_keep_their_spans_and_those_without_answer_have_none() -> None:
    lane = Lane()
    lane.send(1, [0], [sequence(0, TRACES[0])])
    lane.send(2, [0])
    lane.answer(1)
    lane.open(6)
    assert lane.send(1, [0]) == "", "nobody has a slot in a new epoch"
    (span,) = lane.exporter.spans()
    assert {e.key: e.value.int_value for e in span.attributes}[Attribute.EPOCH] == 5


def epochs_of(spans: list[Any]) -> list[tuple[int, int]]:
    """(epoch, step) of each."""
    values = [{entry.key: entry.value.int_value for entry in span.attributes} for span in spans]
    return [(one[Attribute.EPOCH], one[Attribute.STEP]) for one in values]


def test_an_epoch_that_is_raised_while_spans_are_made_is_none_of_theirs() -> None:
    """The exporter's thread has found a step's numbers when the epoch is to be raised."""
    lane = Lane()
    lane.send(1, [0], [sequence(0, TRACES[0])])
    lane.answer(1)
    context = lane.spans.ids.of(np.array([1])).tobytes()
    intruder = Intruder(lane.spans, lambda: lane.open(6))
    find = lane.records.of

    def found(numbers: np.ndarray) -> Any:
        lane.records.of = find  # type: ignore[method-assign]
        columns = find(numbers)
        intruder.come()
        return columns

    lane.records.of = found  # type: ignore[method-assign]
    spans = lane.exporter.spans()
    intruder.leave()
    assert epochs_of(spans) == [(5, 1)]
    assert spans[0].trace_id + spans[0].span_id == context
    assert epochs_of(lane.exporter.spans()) == []
    assert lane.spans._epoch == 6


def test_no_spans_are_made_while_an_epoch_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that had no answer when the spans of its epoch were made has one when the exporter comes, before the
    epoch is another: it would be found, and given out as a step of the new one."""
    lane = Lane()
    lane.send(1, [0], [sequence(0, TRACES[0])])
    spans: list[Any] = []
    intruder = Intruder(lane.spans, lambda: spans.extend(lane.exporter.spans()))
    find, draw = lane.records.of, step_spans.secrets.randbits

    def found(numbers: np.ndarray) -> Any:
        columns = find(numbers)
        intruder.stay()
        return columns

    def drawn(bits: int) -> int:
        monkeypatch.undo()
        lane.answer(1)
        lane.records.of = found  # type: ignore[method-assign]
        intruder.come()
        return draw(bits)

    monkeypatch.setattr(step_spans.secrets, "randbits", drawn)
    lane.spans.open_lane(6, lane.records)
    intruder.leave()
    assert (6, 1) not in epochs_of(spans + lane.exporter.spans())


def test_a_step_that_is_exported_before_its_answer_has_its_span_later() -> None:
    lane = Lane()
    lane.send(1, [0], [sequence(0, TRACES[0])])
    lane.send(2, [0])
    lane.answer(1)
    assert len(lane.exporter.spans()) == 1
    lane.answer(2)
    (span,) = lane.exporter.spans()
    assert span.end_time_unix_nano - span.start_time_unix_nano == 500


def test_a_step_nobody_will_answer_is_forgotten() -> None:
    lane = Lane()
    lane.send(1, [0], [sequence(0, TRACES[0])])
    assert lane.exporter.spans() == []
    lane.send(1 + STEPS_KEPT, [0])
    assert lane.exporter.spans() == []
    assert [number for number, _ in lane.spans._open] == [1 + STEPS_KEPT]


def test_links_are_bounded() -> None:
    lane = Lane(max_links=2)
    lane.send(1, [0, 1, 2], [sequence(index, TRACES[index]) for index in range(3)])
    lane.answer(1)
    assert [len(span.links) for span in lane.exporter.spans()] == [2]


def test_ids_of_steps_differ_and_are_valid() -> None:
    made = StepIds(0, 0)
    contexts = made.of(np.arange(1, 2000))
    seen = {part for row in contexts for part in (row[:16].tobytes(), row[16:].tobytes())}
    assert len(seen) == 2 * 1999
    low = np.array([int.from_bytes(row[8:16].tobytes(), "big") / 2**64 for row in contexts])
    assert abs(np.mean(low < 0.1) - 0.1) < 0.01, "a sampler by ratio would be misled"


@pytest.mark.parametrize("seed", [0, (1 << 64) - 1, 1 << 63])
def test_the_ids_of_many_steps_are_those_in_their_traceparents(seed: int) -> None:
    made = StepIds(seed, seed)
    numbers = np.array([1, 2, 1 << 31, (1 << 40) + 7])
    for row, number in zip(made.of(numbers), numbers.tolist(), strict=True):
        context = TraceContext.parse(made.traceparent(number))
        assert context is not None
        assert row.tobytes() == context.trace_id + context.span_id


def test_a_slot_that_is_given_back_and_given_away_in_one_step_is_the_next_ones() -> None:
    lane = Lane()
    assert lane.send(1, [0, 1], [sequence(0, TRACES[0]), sequence(1)])
    assert lane.send(2, [0, 1], [sequence(0, TRACES[1])], released=[0])
    assert lane.send(3, [0, 1], [sequence(0), sequence(1, TRACES[2])], released=[0, 1])
    assert lane.send(4, [0]) == ""
    assert lane.send(5, [0], released=[1]) == ""
    assert not lane.spans._links, "from here on a step costs two branches"
