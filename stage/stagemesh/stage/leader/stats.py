"""What a stage counts of its steps and links, for metrics. It exists only where metrics are asked for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

import numpy as np

from stagemesh.stage.leader.step_spans import PART_COLUMNS, SENT_BYTES, timing_table
from stagemesh.stage.link_name import link_name
from stagemesh.stage.local_queue import Timings
from stagemesh.v1 import stage_pb2
from stagemesh.wire.telemetry.histogram import BulkHistogram, Series
from stagemesh.wire.telemetry.names import PARTS, Attribute, Span, StageMetric

AT_ONCE = 256
"""Messages of timings that gather before they are sorted into buckets."""
STEPS_REMEMBERED = 512
"""Steps back that a step may repeat the rows of: more than a router keeps."""


class StageStats:
    """Of one stage, through all its lanes.

    Args:
        stage: What it is called in labels; its index.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.step = BulkHistogram(StageMetric.STEP)
        self.link_time = BulkHistogram(StageMetric.LINK_TIME)
        self.tokens: Counter[str] = Counter()
        """Positions computed, by phase."""
        self.link_bytes: Counter[tuple[str, str]] = Counter()
        """By link and transport."""
        self.lanes_opened = 0
        self.lanes_failed: Counter[str] = Counter()
        """By gRPC status code."""
        self.groups_started = 0
        self._phases: dict[int, str] = {}
        self._worker_link: tuple[int, str] | None = None
        self._sampled: dict[int, int] = {}
        """Rows that a step samples: those that a later one may repeat."""
        self._gathered: list[tuple[list[str], Timings]] = []
        self._series: dict[str, list[Series]] = {}
        self._settling = threading.Lock()

    def open_lane(self) -> None:
        """A new epoch: steps count from 1 again."""
        self.lanes_opened += 1
        self._phases.clear()
        self._sampled.clear()
        self._worker_link = None

    def send_from_worker(self, kind: int, transport: str) -> None:
        """The workers send on that link themselves: what it carries is in their timings."""
        self._worker_link = (kind, transport)

    def take_steps(self, steps: Iterable[stage_pb2.Step]) -> None:
        """Steps that came."""
        for step in steps:
            phase, tokens, sampled = self._shape(step)
            self._phases[step.number] = phase
            self._sampled[step.number] = sampled
            self._sampled.pop(step.number - STEPS_REMEMBERED, None)
            self.tokens[phase] += tokens

    def take_timings(self, timings: Timings) -> None:
        """Steps that are done."""
        phases = [self._phases.pop(number, "decode") for number in timings["number"].tolist()]
        self._gathered.append((phases, timings))
        if len(self._gathered) >= AT_ONCE:
            self.settle()

    def sent(self, kind: int, transport: str, num_bytes: int, seconds: float) -> None:
        """A tensor went over a link."""
        self.link_bytes[link_name(kind), transport] += num_bytes
        self._link_series(kind, transport).add(seconds)

    def settle(self) -> None:
        """Sort the gathered timings into their buckets; from any thread."""
        with self._settling:
            gathered, self._gathered = self._gathered, []
            if gathered:
                self._sort(gathered)

    def _sort(self, gathered: list[tuple[list[str], Timings]]) -> None:
        table = timing_table(timings for _, timings in gathered)
        seconds = table[:, PART_COLUMNS] / 1e9
        if self._worker_link:
            kind, transport = self._worker_link
            self.link_bytes[link_name(kind), transport] += int(table[:, SENT_BYTES].sum())
            self._link_series(kind, transport).add_all(seconds[:, PARTS.index(Span.SEND)])
        phases = np.array([phase for some, _ in gathered for phase in some])
        for phase in np.unique(phases).tolist():
            mine = seconds[phases == phase]
            for index, series in enumerate(self._parts(phase)):
                series.add_all(mine[:, index])

    def _link_series(self, kind: int, transport: str) -> Series:
        labels = {
            Attribute.STAGE: self._stage,
            Attribute.LINK: link_name(kind),
            Attribute.TRANSPORT: transport,
        }
        return self.link_time.of(**labels)

    def _parts(self, phase: str) -> list[Series]:
        if phase not in self._series:
            labels = {Attribute.STAGE: self._stage, Attribute.PHASE: phase}
            self._series[phase] = [self.step.of(**labels, **{Attribute.PART: part}) for part in PARTS]
        return self._series[phase]

    def _shape(self, step: stage_pb2.Step) -> tuple[str, int, int]:
        """Phase, positions and sampled rows of a step."""
        if step.WhichOneof("work") == "same_rows_as":
            repeated = self._sampled.get(step.same_rows_as, 0)
            return "decode", repeated, repeated
        rows = step.rows
        count = len(rows.slots) // 4
        tokens = int(np.frombuffer(rows.counts, "<u4").sum()) if rows.counts else count
        sampled = int(np.frombuffer(rows.sample, np.uint8).sum()) if rows.sample else count
        if not rows.tokens:
            return "decode", tokens, sampled
        return ("mixed" if rows.input_steps else "prefill"), tokens, sampled
