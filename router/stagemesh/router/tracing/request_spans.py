"""A request's spans inside the mesh: its queue, each chunk of its prompt on each stage, its decoding on each stage.

What is kept of a request that has ended are the numbers of its steps. The spans are worked out from what the stages
have reported of them, for all requests at once, in the exporter's thread. Times of a stage are moved onto the router's
clock (lane/clock.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.router.api.live_request import LiveRequest
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.router.lane.timings import BUSY, COLUMNS
from stagemesh.router.tracing.step_spans import StepSpans
from stagemesh.wire.telemetry.buffer import Chunk, SpanBuffer
from stagemesh.wire.telemetry.names import PART_MS, Attribute, Span
from stagemesh.wire.telemetry.span_columns import Bytes, Int64, SpanTemplate, ids

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

_PHASE_COLUMNS = {Attribute.STAGE: "int", Attribute.STEPS: "int", **dict.fromkeys(PART_MS, "float")}
_STEP_COLUMNS = {Attribute.STAGE: "int", Attribute.STEP: "int", **dict.fromkeys(PART_MS, "float")}
_FIRST_BUSY = BUSY.start
REQUESTS_AT_ONCE, FULL_AT_ONCE = 256, 8
"""Requests that are worked out together; the second, with a span for each of their steps."""
SPANS_AT_ONCE = 4096
"""Of one chunk: a megabyte and a half."""


@dataclass(frozen=True, slots=True)
class _Ended:
    context: bytes
    queue_ns: tuple[int, int]
    prefill: Int64
    """Numbers of the steps that computed its prompt."""
    decode: Int64


class RequestSpans:
    """Gathers the spans of requests that have ended.

    Args:
        exporter: Asks for the spans.
        steps: That the spans are linked to.
        every_step: A span for each decode step too (--trace full).
    """

    def __init__(self, exporter: SpanExporter, steps: StepSpans, *, every_step: bool) -> None:
        self._step_spans = steps
        self._at_once = FULL_AT_ONCE if every_step else REQUESTS_AT_ONCE
        self._every_step = every_step
        self._ended: SpanBuffer[_Ended] = SpanBuffer(exporter.settings.max_queued, exporter)
        self._made: SpanBuffer[Chunk] = SpanBuffer(exporter.settings.max_queued, exporter)
        self._making = threading.Lock()
        """Held by who reads the stages' times: they may not be forgotten meanwhile."""
        self.stages: Seq[StageLink] = ()
        """Of the lane, once there is one."""
        self._queue = SpanTemplate(Span.QUEUE)
        self._prefill = SpanTemplate(Span.PREFILL, columns=_STEP_COLUMNS, linked=True)  # type: ignore[arg-type]
        self._decode = SpanTemplate(Span.DECODE, columns=_PHASE_COLUMNS)  # type: ignore[arg-type]
        self._decode_step = SpanTemplate(Span.DECODE_STEP, columns=_STEP_COLUMNS, linked=True)  # type: ignore[arg-type]
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Requests whose spans did not fit."""
        return self._ended.num_dropped

    def close_lane(self) -> None:
        """The epoch is over; ids of its steps and the stages' times are not needed after this call."""
        for chunk in self._make():
            self._made.add(chunk)

    def add(self, request: LiveRequest, prefill: Int64, decode: Int64) -> None:
        """A sampled request has ended, and the stages have reported its steps, of these numbers."""
        admitted = request.admitted or request.ended
        queue_ns = (int(request.arrived * 1e9), int(admitted * 1e9))
        self._ended.add(_Ended(request.request.trace, queue_ns, prefill, decode))

    def _spans(self) -> list[Chunk]:
        return [*self._made.take(), *self._make()]

    def _make(self) -> list[Chunk]:
        with self._making:
            ended = self._ended.take()
            batches = (ended[begin : begin + self._at_once] for begin in range(0, len(ended), self._at_once))
            return [chunk for batch in batches for chunk in self._encode(batch)]

    def _encode(self, ended: list[_Ended]) -> list[Chunk]:
        wall = time.time_ns() - time.monotonic_ns()
        contexts = ids(b"".join(one.context for one in ended), 24)
        chunks = [self._queues(ended, contexts, wall)]
        prefill = _OnStages(self.stages, [one.prefill for one in ended])
        if len(prefill):
            chunks += self._steps(self._prefill, prefill, contexts, contexts[prefill.owners, 16:], wall)
        decode = _OnStages(self.stages, [one.decode for one in ended])
        if len(decode):
            firsts = decode.firsts()
            span_ids = _new_ids(len(firsts))
            chunks.append(self._decodes(decode, firsts, contexts, span_ids, wall))
            if self._every_step:
                parents = np.repeat(span_ids, np.diff(firsts, append=len(decode)), axis=0)
                chunks += self._steps(self._decode_step, decode, contexts, parents, wall)
        return chunks

    def _queues(self, ended: list[_Ended], contexts: Bytes, wall: int) -> Chunk:
        times = np.array([one.queue_ns for one in ended], np.int64) + wall
        data = self._queue.encode(
            trace_ids=contexts[:, :16],
            span_ids=_new_ids(len(ended)),
            parent_ids=contexts[:, 16:],
            starts_ns=times[:, 0],
            ends_ns=times[:, 1],
        )
        return data, len(ended)

    def _decodes(self, steps: _OnStages, firsts: Int64, contexts: Bytes, span_ids: Bytes, wall: int) -> Chunk:
        """A span for a request on a stage, from its first decode step's first input to its last one's output."""
        lasts = np.append(firsts[1:], len(steps)) - 1
        owners = steps.owners[firsts]
        data = self._decode.encode(
            trace_ids=contexts[owners, :16],
            span_ids=span_ids,
            parent_ids=contexts[owners, 16:],
            starts_ns=steps.begins[firsts] + wall,
            ends_ns=steps.ends[lasts] + wall,
            columns={
                Attribute.STAGE: steps.stages[firsts],
                Attribute.STEPS: lasts - firsts + 1,
                **_milliseconds(np.add.reduceat(steps.times, firsts, axis=0)),
            },
        )
        return data, len(owners)

    def _steps(
        self, template: SpanTemplate, steps: _OnStages, contexts: Bytes, parents: Bytes, wall: int
    ) -> list[Chunk]:
        """A span for a step on a stage, from its first input to its output, linked to the microbatch's trace."""
        chunks = []
        for begin in range(0, len(steps), SPANS_AT_ONCE):
            some = slice(begin, begin + SPANS_AT_ONCE)
            numbers = steps.numbers[some]
            data = template.encode(
                trace_ids=contexts[steps.owners[some], :16],
                span_ids=_new_ids(len(numbers)),
                parent_ids=parents[some],
                starts_ns=steps.begins[some] + wall,
                ends_ns=steps.ends[some] + wall,
                links=self._step_spans.ids.of(numbers),
                columns={
                    Attribute.STAGE: steps.stages[some],
                    Attribute.STEP: numbers,
                    **_milliseconds(steps.times[some]),
                },
            )
            chunks.append((data, len(numbers)))
        return chunks


class _OnStages:
    """Steps of many requests as far as the stages have reported them: by stage, then request, then number.

    Args:
        stages: That ran them.
        numbers: Of each request.
    """

    def __init__(self, stages: Seq[StageLink], numbers: list[Int64]) -> None:
        asked: Int64 = np.concatenate(numbers)
        owners = np.repeat(np.arange(len(numbers)), [len(some) for some in numbers])
        found = [stage.timings.spans_of(asked) for stage in stages]
        places = np.concatenate([known for known, _, _ in found])
        counts = [len(known) for known, _, _ in found]
        arrivals = np.concatenate([came for _, came, _ in found])
        self.numbers, self.owners = asked[places], owners[places]
        """[n]; of a request, its index."""
        self.stages = np.repeat([stage.index for stage in stages], counts)
        self.times: Int64 = np.concatenate([times for _, _, times in found])
        """[n, 5] nanoseconds of COLUMNS."""
        offsets = np.repeat([stage.clock.offset_ns for stage in stages], counts)
        until = self.times.cumsum(axis=1) + (arrivals - offsets)[:, None]
        self.begins: Int64 = until[:, _FIRST_BUSY - 1]
        """[n] nanoseconds of the router's monotonic clock: the first input came."""
        self.ends: Int64 = until[:, -1]

    def __len__(self) -> int:
        return len(self.numbers)

    def firsts(self) -> Int64:
        """Where the steps of each request on each stage begin."""
        return np.flatnonzero(np.diff(self.owners, prepend=-1) | np.diff(self.stages, prepend=-1))


def _milliseconds(times_ns: Int64) -> dict[str, np.ndarray]:
    times_ms = times_ns / 1e6
    return {PART_MS[index]: times_ms[:, index] for index in range(len(COLUMNS))}


def _new_ids(count: int) -> Bytes:
    return ids(os.urandom(8 * count), 8)
