"""Where the time of the last steps went on one stage."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import numpy.typing as npt

from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, unpack

STEPS_KEPT = 1 << 15
BUSY_WINDOW_S = 10.0
COLUMNS = ("queue", "wait", "compute", "send")


class StageTimings:
    """A ring of the last STEPS_KEPT steps, by step number."""

    def __init__(self) -> None:
        self._numbers = np.zeros(STEPS_KEPT, np.int64)
        self._columns = np.zeros((STEPS_KEPT, len(COLUMNS)), np.int64)
        self._busy: deque[tuple[float, int]] = deque()

    def add(self, report: stage_pb2.StageReport) -> None:
        """Take a report's columns."""
        numbers = unpack(report.numbers, U64, "numbers").astype(np.int64)
        if not len(numbers):
            return
        columns = [
            unpack(getattr(report, f"{name}_ns"), U64, f"{name}_ns", len(numbers)).astype(np.int64)
            for name in COLUMNS
        ]
        where = numbers % STEPS_KEPT
        self._numbers[where] = numbers
        self._columns[where] = np.stack(columns, axis=1)
        self._busy.append((time.monotonic(), int(columns[2].sum())))

    def clear(self) -> None:
        """A new epoch counts from 1 again."""
        self._numbers[:] = 0
        self._busy.clear()

    def of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[known, 4] nanoseconds of queue, wait, compute and send of those steps that are still kept."""
        where = numbers % STEPS_KEPT
        kept: npt.NDArray[np.int64] = self._columns[where[self._numbers[where] == numbers]]
        return kept

    def recent(self, count: int = 256) -> npt.NDArray[np.int64]:
        """The same for the last `count` steps."""
        newest = int(self._numbers.max())
        return self.of(np.arange(max(1, newest - count + 1), newest + 1))

    def busy_share(self) -> float:
        """Share of the last ten seconds in which the stage computed."""
        now = time.monotonic()
        while self._busy and self._busy[0][0] < now - BUSY_WINDOW_S:
            self._busy.popleft()
        if not self._busy:
            return 0.0
        return min(1.0, sum(busy for _, busy in self._busy) / 1e9 / BUSY_WINDOW_S)
