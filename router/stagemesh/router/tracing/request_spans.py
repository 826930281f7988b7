"""A request's spans inside the mesh: its queue, each chunk of its prompt on each stage, its decoding on each stage.

They are worked out once, after the request has ended, from what the stages have reported of its steps. Times of
a stage are moved onto the router's clock (lane/clock.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.router.api.live_request import LiveRequest
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.router.lane.timings import BUSY, COLUMNS
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.tracing.step_spans import StepIds
from stagemesh.wire.telemetry.buffer import Chunk, SpanBuffer, merge
from stagemesh.wire.telemetry.names import PART_MS, Attribute, Span
from stagemesh.wire.telemetry.span_columns import Bytes, Int64, SpanTemplate, ids, link_rows

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

_PHASE_COLUMNS = {Attribute.STAGE: "int", Attribute.STEPS: "int", **dict.fromkeys(PART_MS, "float")}
_STEP_COLUMNS = {Attribute.STAGE: "int", Attribute.STEP: "int", **dict.fromkeys(PART_MS, "float")}
_FIRST_BUSY = BUSY.start
AT_ONCE, FULL_AT_ONCE = 64, 2
"""Requests that are encoded together; the second, with a span for each of their steps."""


@dataclass(frozen=True, slots=True)
class _OnStage:
    """Steps of one request on one stage, by the router's monotonic clock."""

    index: int
    prefill: tuple[Int64, Int64, Int64]
    """[n] numbers, [n] arrivals, [n, 5] nanoseconds of COLUMNS."""
    decode: tuple[Int64, Int64, Int64]


@dataclass(frozen=True, slots=True)
class _Ended:
    context: bytes
    queue_ns: tuple[int, int]
    stages: list[_OnStage]
    steps: StepIds


class RequestSpans:
    """Gathers the spans of requests that have ended.

    Args:
        exporter: Asks for the spans.
        every_step: A span for each decode step too (--trace full).
    """

    def __init__(self, exporter: SpanExporter, *, every_step: bool) -> None:
        self._max_batch = exporter.settings.max_batch
        self._every_step = every_step
        self._ended: SpanBuffer[_Ended] = SpanBuffer(exporter.settings.max_queued)
        self._queue = SpanTemplate(Span.QUEUE)
        self._prefill = SpanTemplate(Span.PREFILL, columns=_STEP_COLUMNS)  # type: ignore[arg-type]
        self._decode = SpanTemplate(Span.DECODE, columns=_PHASE_COLUMNS)  # type: ignore[arg-type]
        self._decode_step = SpanTemplate(Span.DECODE_STEP, columns=_STEP_COLUMNS)  # type: ignore[arg-type]
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Requests whose spans did not fit while the receiver was away."""
        return self._ended.num_dropped

    def add(
        self, context: bytes, request: LiveRequest, sequence: Sequence, stages: Seq[StageLink], steps: StepIds
    ) -> None:
        """A sampled request has ended, and the stages have reported its steps."""
        prefill = np.array(sequence.prefill_steps, np.int64)
        decode = np.array(sequence.decode_steps, np.int64)
        admitted = request.admitted or request.ended
        on_stages = [
            _OnStage(stage.index, _on_router_clock(stage, prefill), _on_router_clock(stage, decode))
            for stage in stages
        ]
        queue_ns = (int(request.arrived * 1e9), int(admitted * 1e9))
        self._ended.add(_Ended(context, queue_ns, on_stages, steps))

    def _spans(self) -> list[Chunk]:
        wall = time.time_ns() - time.monotonic_ns()
        ended = self._ended.take()
        chunks: list[Chunk] = []
        at_once = FULL_AT_ONCE if self._every_step else AT_ONCE
        for begin in range(0, len(ended), at_once):
            some = ended[begin : begin + at_once]
            chunks += [self._queues(some, wall), *self._stages(some, wall)]
        return merge(chunks, self._max_batch)

    def _queues(self, ended: list[_Ended], wall: int) -> Chunk:
        contexts = ids(b"".join(one.context for one in ended), 24)
        times = np.array([one.queue_ns for one in ended], np.int64) + wall
        data = self._queue.encode(
            trace_ids=contexts[:, :16],
            span_ids=_new_ids(len(ended)),
            parent_ids=contexts[:, 16:],
            starts_ns=times[:, 0],
            ends_ns=times[:, 1],
        )
        return data, len(ended)

    def _stages(self, ended: list[_Ended], wall: int) -> list[Chunk]:
        chunks = []
        for place in range(max(len(one.stages) for one in ended)):
            there = [(one, one.stages[place]) for one in ended if place < len(one.stages)]
            chunks.append(
                self._steps(self._prefill, [(one, on.index, on.prefill) for one, on in there], wall)
            )
            decoded = [(one, on) for one, on in there if len(on.decode[0])]
            if not decoded:
                continue
            spans = _new_ids(len(decoded))
            chunks.append(self._decodes(decoded, spans, wall))
            if self._every_step:
                rows = [(one, on.index, on.decode) for one, on in decoded]
                chunks.append(self._steps(self._decode_step, rows, wall, spans))
        return chunks

    def _decodes(self, decoded: list[tuple[_Ended, _OnStage]], span_ids: Bytes, wall: int) -> Chunk:
        contexts = ids(b"".join(one.context for one, _ in decoded), 24)
        sums = np.array([on.decode[2].sum(axis=0) for _, on in decoded]) / 1e6
        starts = [int(on.decode[1][0] + on.decode[2][0, :_FIRST_BUSY].sum()) for _, on in decoded]
        ends = [int(on.decode[1][-1] + on.decode[2][-1].sum()) for _, on in decoded]
        data = self._decode.encode(
            trace_ids=contexts[:, :16],
            span_ids=span_ids,
            parent_ids=contexts[:, 16:],
            starts_ns=np.array(starts, np.int64) + wall,
            ends_ns=np.array(ends, np.int64) + wall,
            columns={
                Attribute.STAGE: np.array([on.index for _, on in decoded]),
                Attribute.STEPS: np.array([len(on.decode[0]) for _, on in decoded]),
                **_milliseconds(sums),
            },
        )
        return data, len(decoded)

    def _steps(
        self,
        template: SpanTemplate,
        rows: list[tuple[_Ended, int, tuple[Int64, Int64, Int64]]],
        wall: int,
        parents: Bytes | None = None,
    ) -> Chunk:
        """A span a step, from its first input to its output, linked to the trace of the microbatch."""
        counts = np.array([len(steps[0]) for _, _, steps in rows], np.int64)
        if not counts.sum():
            return b"", 0
        contexts = np.repeat(ids(b"".join(one.context for one, _, _ in rows), 24), counts, axis=0)
        numbers, arrivals, times = (
            np.concatenate([steps[part] for _, _, steps in rows]) for part in range(3)
        )
        linked = b"".join(
            b"".join(one.steps.of(number)) for one, _, steps in rows for number in steps[0].tolist()
        )
        begins = arrivals + times[:, :_FIRST_BUSY].sum(axis=1) + wall
        data = template.encode(
            trace_ids=contexts[:, :16],
            span_ids=_new_ids(len(numbers)),
            parent_ids=contexts[:, 16:] if parents is None else np.repeat(parents, counts, axis=0),
            starts_ns=begins,
            ends_ns=begins + times[:, BUSY].sum(axis=1),
            links=[row.tobytes() for row in link_rows(ids(linked, 24))],
            columns={
                Attribute.STAGE: np.repeat(np.array([index for _, index, _ in rows]), counts),
                Attribute.STEP: numbers,
                **_milliseconds(times / 1e6),
            },
        )
        return data, len(numbers)


def _on_router_clock(stage: StageLink, numbers: Int64) -> tuple[Int64, Int64, Int64]:
    kept, arrivals, times = stage.timings.spans_of(numbers)
    return kept, arrivals - stage.clock.offset_ns, times


def _milliseconds(times_ms: np.ndarray) -> dict[str, np.ndarray]:
    return {PART_MS[index]: times_ms[:, index] for index in range(len(COLUMNS))}


def _new_ids(count: int) -> Bytes:
    return ids(os.urandom(8 * count), 8)
