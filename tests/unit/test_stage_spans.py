"""The stage's spans of a microbatch: made of what the workers report anyway, of traced steps alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from exporter_for_tests import Exporter, Intruder

from stagemesh.stage.leader.step_spans import RANKS_LAG, StepSpans
from stagemesh.stage.local_queue import StepTiming, Timings, unpack_timings
from stagemesh.wire.telemetry.buffer import Chunk
from stagemesh.wire.telemetry.names import PARTS, Attribute, Span

PARTS_NS = (0, 20, 30, 400, 50)


def traceparent(number: int) -> str:
    return f"00-{number:032x}-{number:016x}-01"


def take(spans: StepSpans, *numbers: int) -> None:
    for number in numbers:
        spans.take_step(number, traceparent(number))


def timings(*numbers: int, parts: tuple[int, ...] = PARTS_NS) -> Timings:
    packed = (StepTiming(7, number, 1_000 * number, *parts, 99).pack() for number in numbers)
    return unpack_timings(b"".join(packed))


def make(**settings: Any) -> tuple[Exporter, StepSpans]:
    exporter = Exporter(**settings)
    spans = StepSpans(exporter)  # type: ignore[arg-type]
    spans.open_lane(2, 7)
    return exporter, spans


def test_a_span_for_each_traced_step_whose_parts_follow_each_other_and_add_up() -> None:
    exporter, spans = make()
    take(spans, 1, 3)
    spans.take_timings(timings(1, 2))
    spans.take_timings(timings(3, parts=(10, *PARTS_NS[1:])))
    found = exporter.spans()
    stages = {span.trace_id: span for span in found if span.name == Span.STAGE}
    assert sorted(int.from_bytes(trace_id, "big") for trace_id in stages) == [1, 3]
    for number, queue_ns in ((1, 0), (3, 10)):
        stage = stages[number.to_bytes(16, "big")]
        values = {entry.key: entry.value.int_value for entry in stage.attributes}
        assert stage.parent_span_id == number.to_bytes(8, "big")
        assert values == {
            Attribute.STAGE: 2,
            Attribute.EPOCH: 7,
            Attribute.STEP: number,
            Attribute.SENT_BYTES: 99,
        }
        parts = [span for span in found if span.parent_span_id == stage.span_id]
        parts.sort(key=lambda part: part.start_time_unix_nano)
        assert [part.name for part in parts] == list(PARTS[0 if queue_ns else 1 :])
        edges = [(part.start_time_unix_nano, part.end_time_unix_nano) for part in parts]
        assert edges[0][0] == stage.start_time_unix_nano
        assert edges[-1][1] == stage.end_time_unix_nano == edges[0][0] + 500 + queue_ns
        assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
    assert not spans._open_steps
    assert exporter.spans() == [], "given away twice"


def test_spans_of_an_epoch_that_ended_are_kept_and_steps_that_never_ended_have_none() -> None:
    exporter, spans = make()
    take(spans, 1, 2)
    spans.take_timings(timings(1))
    assert spans.any_traced
    spans.open_lane(2, 8)
    assert not spans.any_traced
    take(spans, 2)
    assert [span.name for span in exporter.spans()].count(Span.STAGE) == 1


def test_an_epoch_that_is_raised_while_spans_are_made_is_none_of_theirs() -> None:
    """The exporter's thread holds the steps of an epoch when the next one is to be opened, which numbers from 1 too."""
    exporter, spans = make()
    take(spans, 1, 2)
    spans.take_timings(timings(1))
    intruder = Intruder(spans, lambda: spans.open_lane(2, 8))
    make_spans = spans._stage_spans

    def slowly(done: Iterable[Timings]) -> list[Chunk]:
        spans._stage_spans = make_spans  # type: ignore[method-assign]
        intruder.come()
        return make_spans(done)

    spans._stage_spans = slowly  # type: ignore[method-assign]
    found = exporter.spans()
    intruder.leave()
    (stage,) = [span for span in found if span.name == Span.STAGE]
    values = {entry.key: entry.value.int_value for entry in stage.attributes}
    assert (values[Attribute.EPOCH], values[Attribute.STEP]) == (7, 1)
    # The new epoch's second step is not traced.
    spans.take_timings(timings(2))
    assert exporter.spans() == []


def test_what_is_dropped_leaves_nothing_behind() -> None:
    exporter, spans = make(max_queued=2 * (1 + len(PARTS)))
    for number in (1, 2, 3):
        take(spans, number)
        spans.take_timings(timings(number))
    assert [span.name for span in exporter.spans()].count(Span.STAGE) == 2
    assert spans.num_dropped == 2 * (1 + len(PARTS)), "a step and its timings"
    take(spans, 4, 5)
    spans.take_timings(timings(5))
    assert [span.name for span in exporter.spans()].count(Span.STAGE) == 1
    assert not spans._open_steps, "nobody will report step 4 any more"


def test_steps_that_come_faster_than_the_timer_wake_the_exporter() -> None:
    """With the queue that the specification defaults to; the exporter is woken before one of its steps is dropped."""
    exporter, spans = make(max_queued=2048)
    num_found = num_wakes = 0
    for number in range(1, 1501):
        take(spans, number)
        spans.take_timings(timings(number))
        if exporter.num_wakes > num_wakes:
            num_found += [span.name for span in exporter.spans()].count(Span.STAGE)
            num_wakes = exporter.num_wakes
    num_found += [span.name for span in exporter.spans()].count(Span.STAGE)
    assert (num_found, spans.num_dropped) == (1500, 0)
    assert num_wakes <= 2 * 9, "each of two buffers where it is half full, and not for each step"


def test_ranks_are_remembered_for_a_number_of_steps() -> None:
    exporter = Exporter()
    spans = StepSpans(exporter, ranks=True)  # type: ignore[arg-type]
    spans.open_lane(2, 7)
    for number in (1, 5, 3 * RANKS_LAG, 3 * RANKS_LAG + 7):
        take(spans, number)
    spans.take_timings(timings(3 * RANKS_LAG))
    ranks = [span for span in exporter.spans() if span.name == Span.RANK]
    assert list(spans._traced) == [3 * RANKS_LAG, 3 * RANKS_LAG + 7]
    spans.take_rank(1, timings(1, 3 * RANKS_LAG))
    ranks += [span for span in exporter.spans() if span.name == Span.RANK]
    assert [span.attributes[0].value.int_value for span in ranks] == [0, 1]
