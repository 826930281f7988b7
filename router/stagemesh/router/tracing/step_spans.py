"""Traces of microbatches: the router's root span of each, with links to the sampled requests in it."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.router.scheduler import Step
from stagemesh.wire.telemetry.buffer import Chunk, SpanBuffer
from stagemesh.wire.telemetry.names import Attribute, Span
from stagemesh.wire.telemetry.span_columns import LINK_ROW, Bytes, Int64, SpanTemplate, ids, link_rows

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.exporter import SpanExporter

_COLUMNS = (Attribute.EPOCH, Attribute.STEP, Attribute.ROWS, Attribute.TOKENS, Attribute.PREFILL_TOKENS)
_MASK = (1 << 64) - 1


class StepSpans:
    """Decides which steps of a lane are traced, those with a sampled request in them, and gathers their spans.

    Args:
        exporter: Asks for the spans.
        lane_id: For the spans.
    """

    def __init__(self, exporter: SpanExporter, lane_id: str) -> None:
        self._max_links = exporter.settings.max_links
        self._max_batch = exporter.settings.max_batch
        self._template = SpanTemplate(
            Span.STEP,
            attributes={Attribute.LANE: lane_id},
            columns=dict.fromkeys(_COLUMNS, "int"),
            root=True,
        )
        self.ids = StepIds(0, 0)
        self._epoch = 0
        self._traced = np.zeros(0, np.bool_)
        self._links: Bytes = np.zeros((0, LINK_ROW), np.uint8)
        self._open: dict[int, tuple[int, int, int, int, bytes]] = {}
        self._done: SpanBuffer[tuple[tuple[int, ...], bytes, bytes]] = SpanBuffer(
            exporter.settings.max_queued
        )
        exporter.register(self._spans)

    @property
    def num_dropped(self) -> int:
        """Spans that did not fit while the receiver was away."""
        return self._done.num_dropped

    def open_lane(self, epoch: int, max_slots: int) -> None:
        """A new epoch: no slot is taken, no step is on its way."""
        self.ids = StepIds(secrets.randbits(64), secrets.randbits(64))
        self._epoch = epoch
        self._traced = np.zeros(max_slots, np.bool_)
        self._links = np.zeros((max_slots, LINK_ROW), np.uint8)
        self._open.clear()

    def step_sent(self, step: Step, sent_ns: int) -> str:
        """The step's traceparent; empty if it carries no sampled request. Called for every step, in order."""
        for sequence in step.changes.admitted:
            trace = sequence.request.trace
            self._traced[sequence.slot] = bool(trace)
            if trace:
                self._links[sequence.slot] = link_rows(ids(trace, 24))[0]
        traced = self._traced[step.slots]
        if not traced.any():
            return ""
        links = self._links[step.slots[traced][: self._max_links]].tobytes()
        tokens = step.num_tokens
        self._open[step.number] = (sent_ns, len(step.slots), tokens, tokens - step.num_decodes, links)
        trace_id, span_id = self.ids.of(step.number)
        return f"00-{trace_id.hex()}-{span_id.hex()}-01"

    def step_done(self, number: int) -> None:
        """The step's result has come."""
        if self._open and (opened := self._open.pop(number, None)):
            sent_ns, rows, tokens, prefill, links = opened
            trace_id, span_id = self.ids.of(number)
            values = (sent_ns, time.monotonic_ns(), self._epoch, number, rows, tokens, prefill)
            self._done.add((values, trace_id + span_id, links))

    def _spans(self) -> list[Chunk]:
        done = self._done.take()
        size = max(1, self._max_batch // 8)  # a root has up to max_links links, and is as large as that
        return [self._encode(done[begin : begin + size]) for begin in range(0, len(done), size)]

    def _encode(self, done: list[tuple[tuple[int, ...], bytes, bytes]]) -> Chunk:
        table: Int64 = np.array([values for values, _, _ in done], np.int64)
        contexts = ids(b"".join(context for _, context, _ in done), 24)
        wall = time.time_ns() - time.monotonic_ns()
        data = self._template.encode(
            trace_ids=contexts[:, :16],
            span_ids=contexts[:, 16:],
            starts_ns=table[:, 0] + wall,
            ends_ns=table[:, 1] + wall,
            links=[links for _, _, links in done],
            columns={key: table[:, 2 + index] for index, key in enumerate(_COLUMNS)},
        )
        return data, len(done)


class StepIds:
    """Trace and span id of every step of an epoch, from its number: a request's spans can name them later.

    Args:
        trace_seed: 64 random bits.
        span_seed: 64 random bits.
    """

    def __init__(self, trace_seed: int, span_seed: int) -> None:
        self._high = trace_seed.to_bytes(8, "big")
        self._trace_seed = trace_seed
        self._span_seed = span_seed

    def of(self, number: int) -> tuple[bytes, bytes]:
        """(trace id, id of the root span) of step `number`."""
        trace_id = self._high + _scramble(self._trace_seed + number).to_bytes(8, "big")
        return trace_id, _scramble(self._span_seed + number).to_bytes(8, "big")


def _scramble(value: int) -> int:
    """splitmix64: neighbours get ids that look random, which samplers behind the receiver count on."""
    value = value * 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31 or 1
