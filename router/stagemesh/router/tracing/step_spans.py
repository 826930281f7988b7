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
from stagemesh.router.scheduler.step import Changes
from stagemesh.wire.telemetry.buffer import MAX_REQUEST_BYTES, Chunk, SpanBuffer
from stagemesh.wire.telemetry.names import Attribute, Span
from stagemesh.wire.telemetry.span_columns import LINK_ROW, Bytes, Int64, SpanTemplate, link

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

_COLUMNS = (Attribute.EPOCH, Attribute.STEP, Attribute.ROWS, Attribute.TOKENS, Attribute.PREFILL_TOKENS)
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
        self._links: dict[int, bytes] = {}
        """By slot: the link to the sampled request that has it."""
        self._found: dict[int, bytes] = {}
        """By step, since `_links` last changed: the links of the requests in it, for steps that repeat its rows."""
        self._sent: SpanBuffer[tuple[int, bytes]] = SpanBuffer(exporter.settings.max_queued, exporter)
        """Numbers and links of traced steps; whether they have been answered is found out in the exporter's thread."""
        self._open: list[tuple[int, bytes]] = []
        """Those that had not been when it looked."""
        self._making = threading.Lock()
        """Held where spans are made, and where the epoch changes: the numbers of an older one may not come into it."""
        self._made: SpanBuffer[Chunk] = SpanBuffer(exporter.settings.max_queued, exporter)
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that did not fit."""
        return self._sent.num_dropped

    def open_lane(self, epoch: int, records: StepRecords) -> None:
        """A new epoch: no slot is taken, no step is on its way.

        Args:
            epoch: Of the lane.
            records: Of the steps; they may be emptied after this call, not before.
        """
        with self._making:
            for chunk in self._make():
                self._made.add(chunk)
            self.ids = StepIds(secrets.randbits(64), secrets.randbits(64))
            self._epoch, self._records = epoch, records
            self._links.clear()
            self._found.clear()
            self._open = []

    def step_sent(self, step: Step) -> str:
        """The step's traceparent; empty if it carries no sampled request. Called for every step, in order."""
        # Without numpy: its code has left the caches since the last step, and each call here would cost microseconds.
        links, changes = self._links, step.changes
        if changes.admitted or (links and changes.released):
            self._change(changes)
        if not links:
            return ""
        found = self._found.get(step.same_rows_as)
        if found is None:
            found = self._links_in(step.slots.tolist())
        self._found[step.number] = found
        if not found:
            return ""
        self._sent.add((step.number, found))
        return self.ids.traceparent(step.number)

    def _change(self, changes: Changes) -> None:
        """Requests leave their slots, and others take some."""
        links = self._links
        for slot in changes.released:
            links.pop(slot, None)
        for sequence in changes.admitted:
            links.pop(sequence.slot, None)
            if sequence.request.trace:
                links[sequence.slot] = link(sequence.request.trace)
        self._found.clear()

    def _links_in(self, slots: list[int]) -> bytes:
        if len(self._found) > STEPS_KEPT:
            self._found.clear()
        if self._links.keys().isdisjoint(slots):
            return b""
        return b"".join([self._links[slot] for slot in slots if slot in self._links][: self._max_links])

    def _spans(self) -> list[Chunk]:
        with self._making:
            return [*self._made.take(), *self._make()]

    def _make(self) -> list[Chunk]:
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
