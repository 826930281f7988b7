"""Traces of microbatches: the router's root span of each, with links to the sampled requests in it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.router.lane.step_records import DONE_NS, StepRecords
from stagemesh.router.lane.timings import STEPS_KEPT
from stagemesh.router.scheduler import Step
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.wire.telemetry.buffer import MAX_REQUEST_BYTES, Chunk, SpanBuffer
from stagemesh.wire.telemetry.names import Attribute, Span
from stagemesh.wire.telemetry.span_columns import LINK_ROW, Bytes, Int64, SpanTemplate, ids, link_rows

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

_COLUMNS = (Attribute.EPOCH, Attribute.STEP, Attribute.ROWS, Attribute.TOKENS, Attribute.PREFILL_TOKENS)
_TRUE = b"\x01"
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
        self._sent: SpanBuffer[tuple[int, bytes]] = SpanBuffer(exporter.settings.max_queued)
        """Numbers and links of traced steps; whether they have been answered is found out in the exporter's thread."""
        self._open: list[tuple[int, bytes]] = []
        """Those that had not been when it looked."""
        self._making = threading.Lock()
        self._made: SpanBuffer[Chunk] = SpanBuffer(exporter.settings.max_queued)
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that did not fit while the receiver was away."""
        return self._sent.num_dropped

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
        self._open.clear()

    def step_sent(self, step: Step) -> str:
        """The step's traceparent; empty if it carries no sampled request. Called for every step, in order."""
        changes = step.changes
        if self._any_traced and changes.released:
            self._traced[changes.released] = False
            self._any_traced = bool(self._traced.any())
        if changes.admitted:
            self._take_admitted(changes.admitted)
        if not self._any_traced or not (links := self._links_in(step.slots)):
            return ""
        self._sent.add((step.number, links))
        return self.ids.traceparent(step.number)

    def _links_in(self, slots: Int64) -> bytes:
        # A step in two has none, and whatever is called here has left the caches since the last step.
        traced = self._traced.take(slots)
        if _TRUE not in traced.tobytes():
            return b""
        return self._links.take(slots.compress(traced)[: self._max_links], axis=0).tobytes()

    def _take_admitted(self, admitted: list[Sequence]) -> None:
        """They have slots from this step on."""
        if self._any_traced:
            self._traced[[sequence.slot for sequence in admitted]] = False
        if sampled := [sequence for sequence in admitted if sequence.request.trace]:
            slots = [sequence.slot for sequence in sampled]
            self._links[slots] = link_rows(ids(b"".join(one.request.trace for one in sampled), 24))
            self._traced[slots] = self._any_traced = True

    def _spans(self) -> list[Chunk]:
        return [*self._made.take(), *self._make()]

    def _make(self) -> list[Chunk]:
        with self._making:
            links = dict([*self._open, *self._sent.take()])
            numbers, columns = self._records.of(np.array(list(links), np.int64))
            answered = columns[:, DONE_NS] > 0
            numbers, columns = numbers[answered], columns[answered]
            ended, oldest = set(numbers.tolist()), max(links, default=0) - STEPS_KEPT
            self._open = [one for one in links.items() if one[0] not in ended and one[0] > oldest]
            size = max(1, MAX_REQUEST_BYTES // (ROOT_BYTES + LINK_ROW * self._max_links))
            batches = (slice(begin, begin + size) for begin in range(0, len(numbers), size))
            return [self._encode(numbers[some], columns[some], links) for some in batches]

    def _encode(self, numbers: Int64, columns: Int64, links: Mapping[int, bytes]) -> Chunk:
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
