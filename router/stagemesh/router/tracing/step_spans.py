"""Traces of microbatches: the router's root span of each, with links to the sampled requests in it."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.scheduler import Step
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.wire.telemetry.buffer import MAX_REQUEST_BYTES, Chunk, SpanBuffer
from stagemesh.wire.telemetry.names import Attribute, Span
from stagemesh.wire.telemetry.span_columns import LINK_ROW, Bytes, Int64, SpanTemplate, ids, link_rows

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

_COLUMNS = (Attribute.EPOCH, Attribute.STEP, Attribute.ROWS, Attribute.TOKENS, Attribute.PREFILL_TOKENS)
REPEATED_WITHIN = 512
"""Steps back that a step may repeat the rows of and be known by it."""
ROOT_BYTES = 512
"""Of a root without its links, at most."""
_MASK = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15


class StepSpans:
    """Decides which steps of a lane are traced, those with a sampled request in them, and makes their spans.

    Args:
        exporter: Asks for the spans.
        lane_id: For the spans.
    """

    def __init__(self, exporter: SpanExporter, lane_id: str) -> None:
        self._max_links = exporter.settings.max_links
        self._template = SpanTemplate(
            Span.STEP,
            attributes={Attribute.LANE: lane_id},
            columns=dict.fromkeys(_COLUMNS, "int"),
            root=True,
        )
        self.ids = StepIds(1, 1)
        self._epoch = 0
        self._records = StepRecords()
        self._traced = np.zeros(0, np.bool_)
        self._any_traced = False
        self._links: Bytes = np.zeros((0, LINK_ROW), np.uint8)
        self._of_sampled = [b""] * REPEATED_WITHIN
        """Links of the rows that each of the last steps sampled, by its number."""
        self.open_steps: dict[int, bytes] = {}
        """Links of the traced steps that have no answer yet."""
        self._done: SpanBuffer[tuple[int, bytes]] = SpanBuffer(exporter.settings.max_queued)
        self._made: SpanBuffer[Chunk] = SpanBuffer(exporter.settings.max_queued)
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that did not fit while the receiver was away."""
        return self._done.num_dropped

    def open_lane(self, epoch: int, max_slots: int, records: StepRecords) -> None:
        """A new epoch: no slot is taken, no step is on its way.

        Args:
            epoch: Of the lane.
            max_slots: Sequences at once.
            records: Of the steps; they may be emptied after this call, not before.
        """
        for chunk in self._make():
            self._made.add(chunk)
        self.ids = StepIds(secrets.randbits(64), secrets.randbits(64))
        self._epoch, self._records = epoch, records
        self._traced = np.zeros(max_slots, np.bool_)
        self._any_traced = False
        self._links = np.zeros((max_slots, LINK_ROW), np.uint8)
        self._of_sampled = [b""] * REPEATED_WITHIN
        self.open_steps.clear()

    def step_sent(self, step: Step) -> str:
        """The step's traceparent; empty if it carries no sampled request. Called for every step, in order."""
        changes = step.changes
        if self._any_traced and changes.released:
            self._traced[changes.released] = False
            self._any_traced = bool(self._traced.any())
        if changes.admitted:
            self._take_admitted(changes.admitted)
        links = self._links_of(step) if self._any_traced else b""
        # Not of a prompt that this step computes a part of.
        sampled = self._links_in(step.sampled_slots) if links and step.tokens else links
        self._of_sampled[step.number % REPEATED_WITHIN] = sampled
        if not links:
            return ""
        self.open_steps[step.number] = links
        return self.ids.traceparent(step.number)

    def _links_of(self, step: Step) -> bytes:
        # Most steps repeat rows, and to look is dearer than it seems: between two steps the caches forget numpy.
        if step.same_rows_as > max(0, step.number - REPEATED_WITHIN):
            return self._of_sampled[step.same_rows_as % REPEATED_WITHIN]
        return self._links_in(step.slots)

    def _links_in(self, slots: Int64) -> bytes:
        traced = slots[self._traced[slots]]
        return self._links[traced[: self._max_links]].tobytes() if len(traced) else b""

    def _take_admitted(self, admitted: list[Sequence]) -> None:
        """They have slots from this step on."""
        if self._any_traced:
            self._traced[[sequence.slot for sequence in admitted]] = False
        if sampled := [sequence for sequence in admitted if sequence.request.trace]:
            slots = [sequence.slot for sequence in sampled]
            self._links[slots] = link_rows(ids(b"".join(one.request.trace for one in sampled), 24))
            self._traced[slots] = self._any_traced = True

    def step_done(self, number: int) -> None:
        """The step's result has come; called while there are open steps."""
        if links := self.open_steps.pop(number, None):
            self._done.add((number, links))

    def _spans(self) -> list[Chunk]:
        return [*self._made.take(), *self._make()]

    def _make(self) -> list[Chunk]:
        done = self._done.take()
        size = max(1, MAX_REQUEST_BYTES // (ROOT_BYTES + LINK_ROW * self._max_links))
        return [self._encode(done[begin : begin + size]) for begin in range(0, len(done), size)]

    def _encode(self, done: list[tuple[int, bytes]]) -> Chunk:
        links = dict(done)
        numbers, columns = self._records.of(np.array(list(links), np.int64))
        sent, ended, *shape = columns.T
        contexts = self.ids.of(numbers)
        wall = time.time_ns() - time.monotonic_ns()
        values = (np.full(len(numbers), self._epoch), numbers, *shape)
        data = self._template.encode(
            trace_ids=contexts[:, :16],
            span_ids=contexts[:, 16:],
            starts_ns=sent + wall,
            ends_ns=ended + wall,
            tails=[links[number] for number in numbers.tolist()],
            columns=dict(zip(_COLUMNS, values, strict=True)),
        )
        return data, len(numbers)


class StepIds:
    """Trace and span id of every step of an epoch, from its number: a request's spans can name them later.

    The ids of an epoch are evenly spread over their 64 bits, which samplers behind the receiver count on.

    Args:
        trace_seed: 64 random bits.
        span_seed: 64 random bits.
    """

    def __init__(self, trace_seed: int, span_seed: int) -> None:
        self._high = trace_seed or 1
        self._head = f"00-{self._high:016x}"
        self._trace_seed = trace_seed
        self._span_seed = span_seed

    def traceparent(self, number: int) -> str:
        """Of step `number`, sampled."""
        trace, span = self._low(number)
        return f"{self._head}{trace:016x}-{span:016x}-01"

    def of(self, numbers: Int64) -> Bytes:
        """[N, 24] trace ids and ids of the root spans of steps."""
        spread = numbers.astype(np.uint64) * np.uint64(_WEYL)
        parts = np.empty((len(numbers), 3), ">u8")
        parts[:, 0] = self._high
        parts[:, 1] = spread + np.uint64(self._trace_seed)
        parts[:, 2] = np.maximum(spread + np.uint64(self._span_seed), np.uint64(1))
        return parts.view(np.uint8)

    def _low(self, number: int) -> tuple[int, int]:
        spread = number * _WEYL
        return (self._trace_seed + spread) & _MASK, (self._span_seed + spread) & _MASK or 1
