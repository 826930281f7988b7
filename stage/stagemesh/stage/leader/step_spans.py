"""The stage's part in the trace of a microbatch: a span, and a child for each part of its time.

They are made in the exporter's thread, from the steps' traceparents and the timings that the workers report anyway. The
serving thread only keeps both: between two steps the caches forget its code, and what takes a microsecond in a loop takes
ten there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.stage.local_queue import StepTiming, Timings
from stagemesh.wire.telemetry.buffer import Chunk, SpanBuffer
from stagemesh.wire.telemetry.names import PART_MS, PARTS, SPANS_OF_A_STEP, Attribute, Span
from stagemesh.wire.telemetry.span_columns import Bytes, Int64, SpanRow, SpanTemplate, ids

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

STEPS_AT_ONCE = 2048
"""Whose spans are made together: a megabyte and a half."""
RANKS_LAG = 1024
"""Steps that a rank may report later than rank 0 does."""
TRACEPARENT_LENGTH = 55
_ID_DIGITS = np.r_[3:35, 36:52]
_MIX = np.uint64(0x9E3779B97F4A7C15)
SENT_BYTES = 8
"""Column of a packed StepTiming."""
PART_COLUMNS = slice(3, 3 + len(PARTS))
"""Columns of a packed StepTiming with the parts' nanoseconds, in the order of PARTS."""


class StepSpans:
    """Gathers the traced steps of one stage.

    Args:
        exporter: Asks for the spans.
        ranks: A span for each tensor-parallel rank too.
    """

    def __init__(self, exporter: SpanExporter, *, ranks: bool = False) -> None:
        self._ranks = ranks
        self._traced: dict[int, str] = {}
        """Of the last RANKS_LAG steps, where ranks are wanted."""
        self._of_ranks: SpanBuffer[tuple[int, Timings]] = SpanBuffer(exporter.settings.max_queued, exporter)
        self._rank = SpanTemplate(
            Span.RANK,
            columns={Attribute.RANK: "int", **dict.fromkeys(PART_MS, "float")},
        )
        steps_queued = exporter.settings.max_queued // SPANS_OF_A_STEP
        self._stage_index = 0
        self.any_traced = False
        """Of this epoch's steps."""
        self._came: SpanBuffer[tuple[int, str]] = SpanBuffer(steps_queued, exporter)
        """Numbers and traceparents of traced steps."""
        self._done: SpanBuffer[Timings] = SpanBuffer(steps_queued, exporter)
        """All that was reported since the first traced step, traced or not: which is found out in the exporter's thread."""
        self._open_steps: dict[int, str] = {}
        """Of the traced steps that have not been reported, the traceparents; of the exporter's thread."""
        self._made: SpanBuffer[Chunk] = SpanBuffer(exporter.settings.max_queued, exporter)
        self._making = threading.Lock()
        """Held where spans are made, and where the epoch changes: the numbers of an older one may not come into it."""
        self._slot, *self._parts = (SpanTemplate(part) for part in PARTS)
        self._stage = _stage_template(0, 0)
        self._row = SpanRow([self._stage, *self._parts])
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that did not fit."""
        return (self._came.num_dropped + self._done.num_dropped) * SPANS_OF_A_STEP

    def open_lane(self, stage_index: int, epoch: int) -> None:
        """Steps of an older epoch do not end any more."""
        with self._making:
            for chunk in self._make():
                self._made.add(chunk)
            self._stage_index = stage_index
            self._stage = _stage_template(stage_index, epoch)
            self._row = SpanRow([self._stage, *self._parts])
            self.any_traced = False
            self._open_steps.clear()
            self._traced.clear()

    def take_step(self, number: int, traceparent: str) -> None:
        """A traced step came."""
        self._came.add((number, traceparent))
        self.any_traced = True

    def take_timings(self, timings: Timings) -> None:
        """Steps that are done; called once a step is traced."""
        self._done.add(timings)
        if self._ranks:
            self.take_rank(0, timings)

    def take_rank(self, rank: int, timings: Timings) -> None:
        """The same of one rank."""
        self._of_ranks.add((rank, timings))

    def _spans(self) -> list[Chunk]:
        with self._making:
            return [*self._made.take(), *self._make()]

    def _make(self) -> list[Chunk]:
        # In this order: a step that is done has come before.
        of_ranks, done, came = self._of_ranks.take(), self._done.take(), self._came.take()
        self._open_steps.update(came)
        if self._ranks:
            self._traced.update(came)
        return [*self._stage_spans(done), *self._rank_spans(of_ranks)]

    def _rank_spans(self, reported: Iterable[tuple[int, Timings]]) -> list[Chunk]:
        """Children of the stage's spans."""
        chunks = []
        for rank, timings in reported:
            found = [self._traced.get(number, "") for number in timings["number"].tolist()]
            traced = np.flatnonzero(np.array(found) != "")
            if not len(traced):
                continue
            table = timing_table([timings])[traced]
            traces, roots = parents_of(found[place] for place in traced)
            parts = table[:, PART_COLUMNS]
            arrivals = table[:, 2] + (time.time_ns() - time.monotonic_ns())
            milliseconds = {key: parts[:, index] / 1e6 for index, key in enumerate(PART_MS)}
            data = self._rank.encode(
                trace_ids=traces,
                span_ids=ids(os.urandom(8 * len(traced)), 8),
                parent_ids=self._stage_ids(roots),
                starts_ns=arrivals,
                ends_ns=arrivals + parts.sum(axis=1),
                columns={Attribute.RANK: np.full(len(traced), rank), **milliseconds},
            )
            chunks.append((data, len(traced)))
        newest = next(reversed(self._traced), 0)
        for number in [number for number in self._traced if number <= newest - RANKS_LAG]:
            del self._traced[number]
        return chunks

    def _stage_ids(self, roots: Bytes) -> Bytes:
        """[N, 8] ids of this stage's spans below these root spans, so that ranks know their parent's."""
        mixed = (np.ascontiguousarray(roots).view("<u8")[:, 0] ^ np.uint64(self._stage_index + 1)) * _MIX
        return ids((mixed ^ (mixed >> np.uint64(29)) | np.uint64(1)).astype("<u8").tobytes(), 8)

    def _stage_spans(self, done: Iterable[Timings]) -> list[Chunk]:
        table = timing_table(done)
        numbers = table[:, 1].tolist()
        traceparents = [self._open_steps.pop(number, "") for number in numbers]
        if numbers:
            # A stage does its steps in order: what is open before one that is done was dropped.
            for number in [number for number in self._open_steps if number < numbers[-1]]:
                del self._open_steps[number]
        traced = [place for place, traceparent in enumerate(traceparents) if traceparent]
        batches = (traced[begin : begin + STEPS_AT_ONCE] for begin in range(0, len(traced), STEPS_AT_ONCE))
        return [self._encode([traceparents[place] for place in batch], table[batch]) for batch in batches]

    def _encode(self, traceparents: list[str], table: Int64) -> Chunk:
        traces, roots = parents_of(traceparents)
        count = len(traceparents)
        times = table[:, 2 : 3 + len(PARTS)].copy()
        times[:, 0] += time.time_ns() - time.monotonic_ns()
        times = times.cumsum(axis=1).T  # begin of the first part, then the end of each
        stages = self._stage_ids(roots)
        part_ids = ids(os.urandom(8 * count * len(PARTS)), 8).reshape(len(PARTS), count, 8)
        data, (stage_rows, *part_rows) = self._row.rows(count)
        columns = {Attribute.STEP: table[:, 1], Attribute.SENT_BYTES: table[:, SENT_BYTES]}
        self._stage.fill(stage_rows, traces, stages, times[0], times[-1], roots, columns)
        for index, (template, rows) in enumerate(zip(self._parts, part_rows, strict=True), start=1):
            template.fill(rows, traces, part_ids[index], times[index], times[index + 1], stages)
        # Most steps find the stage free: then there is no queue to show.
        queued = np.flatnonzero(times[1] > times[0])
        if not len(queued):
            return bytes(data), count * len(PARTS)
        slots = self._slot.encode(
            trace_ids=traces[queued],
            span_ids=part_ids[0, queued],
            parent_ids=stages[queued],
            starts_ns=times[0, queued],
            ends_ns=times[1, queued],
        )
        return bytes(data) + slots, count * len(PARTS) + len(queued)


def _stage_template(stage_index: int, epoch: int) -> SpanTemplate:
    return SpanTemplate(
        Span.STAGE,
        attributes={Attribute.STAGE: stage_index, Attribute.EPOCH: epoch},
        columns={Attribute.STEP: "int", Attribute.SENT_BYTES: "int"},
    )


def timing_table(timings: Iterable[Timings]) -> Int64:
    """[N, 9] fields of StepTimings in their order."""
    data = b"".join(some.tobytes() for some in timings)
    return np.frombuffer(data, "<i8").reshape(-1, StepTiming.SIZE // 8)


def parents_of(traceparents: Iterable[str]) -> tuple[Bytes, Bytes]:
    """[N, 16] trace ids and [N, 8] span ids; traceparents of version 00 are of one length."""
    text = np.frombuffer("".join(traceparents).encode(), np.uint8).reshape(-1, TRACEPARENT_LENGTH)
    both = ids(bytes.fromhex(text[:, _ID_DIGITS].tobytes().decode()), 24)
    return both[:, :16], both[:, 16:]
