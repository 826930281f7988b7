"""Where the time of the last steps went on one stage."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import numpy.typing as npt

from stagemesh.router.lane.step_sums import StepSums
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, unpack

Int64 = npt.NDArray[np.int64]

STEPS_KEPT = 1 << 15
WINDOW_S = 10.0
"""What is recent."""
COLUMNS = ("queue", "wait", "receive", "compute", "send")
"""In the order in which they follow each other, from arrival."""
BUSY = slice(2, 5)
"""Of COLUMNS: what a step takes of a stage, all but waiting for others."""


class StageTimings:
    """A ring of the last STEPS_KEPT steps, by step number."""

    def __init__(self) -> None:
        self._numbers = np.zeros(STEPS_KEPT, np.int64)
        self._arrivals = np.zeros(STEPS_KEPT, np.int64)
        self._columns = np.zeros((STEPS_KEPT, len(COLUMNS)), np.int64)
        self._window: deque[tuple[float, int]] = deque()
        """(monotonic seconds, compute nanoseconds) of the reports of the last WINDOW_S."""
        self.busy_ns = StepSums(STEPS_KEPT)
        """Of each step, BUSY together."""

    def add(self, report: stage_pb2.StageReport) -> tuple[Int64, Int64]:
        """Take a report's columns; returns its step numbers, [n], and their times in nanoseconds, [n, 6]: when
        each step reached the stage, on the stage's clock, then COLUMNS."""
        numbers = unpack(report.numbers, U64, "numbers").astype(np.int64)
        times_ns = np.zeros((len(numbers), 1 + len(COLUMNS)), np.int64)
        for index, name in enumerate(("arrival", *COLUMNS)):
            data = getattr(report, f"{name}_ns")
            # A stage of the minor version before this one has no receive_ns; its parts leave a gap there.
            if data or name != "receive":
                times_ns[:, index] = unpack(data, U64, f"{name}_ns", len(numbers))
        if len(numbers):
            where = numbers % STEPS_KEPT
            self._numbers[where] = numbers
            self._arrivals[where] = times_ns[:, 0]
            self._columns[where] = times_ns[:, 1:]
            self._window.append((time.monotonic(), int(times_ns[:, 1 + COLUMNS.index("compute")].sum())))
            self.busy_ns.add(numbers, times_ns[:, 1:][:, BUSY].sum(axis=1))
        return numbers, times_ns

    def clear(self) -> None:
        """A new epoch counts from 1 again."""
        self._numbers[:] = 0
        self._window.clear()
        self.busy_ns.clear()

    def has(self, number: int) -> bool:
        """Whether the stage has reported that step; there is no step 0."""
        return not number or bool(self._numbers[number % STEPS_KEPT] == number)

    def of(self, numbers: Int64) -> Int64:
        """[known, 5] nanoseconds of COLUMNS of those steps that are still kept."""
        return self.spans_of(numbers)[2]

    def spans_of(self, numbers: Int64) -> tuple[Int64, Int64, Int64]:
        """[known] places in `numbers` of those steps that are still kept, their [known] arrivals by the stage's
        monotonic clock, and [known, 5] nanoseconds of COLUMNS."""
        where = numbers % STEPS_KEPT
        known = np.flatnonzero(self._numbers[where] == numbers)
        where = where[known]
        return known, self._arrivals[where], self._columns[where]

    def recent(self, count: int = 256) -> Int64:
        """The same for the last `count` steps."""
        newest = int(self._numbers.max())
        return self.of(np.arange(max(1, newest - count + 1), newest + 1))

    def busy_share(self) -> float:
        """Share of the last ten seconds in which the stage computed. Called in the event loop and by a scrape."""
        oldest = time.monotonic() - WINDOW_S
        while self._window and self._window[0][0] < oldest:
            self._window.popleft()
        return min(1.0, sum(compute_ns for _, compute_ns in tuple(self._window)) / 1e9 / WINDOW_S)
