"""What the lane remembers of the steps it sent: when, when the answer came, what was in them; and what stood idle."""

from __future__ import annotations

import time
from bisect import bisect_left

import numpy as np

from stagemesh.router.bubble import ActiveTime, bubble_share
from stagemesh.router.lane.step_sums import StepSums
from stagemesh.router.lane.timings import STEPS_KEPT, WINDOW_S, Int64, StageTimings
from stagemesh.router.scheduler import Step

COLUMNS = ("sent_ns", "done_ns", "rows", "tokens", "prefill_tokens")
"""Times are the router's monotonic clock; done_ns is 0 while there is no answer."""
DONE_NS = COLUMNS.index("done_ns")


class StepRecords:
    """A ring of the last STEPS_KEPT steps of an epoch, by step number."""

    def __init__(self) -> None:
        self._numbers = np.zeros(STEPS_KEPT, np.int64)
        self._columns = np.zeros((STEPS_KEPT, len(COLUMNS)), np.int64)
        self._active = ActiveTime()
        self._active_ns = StepSums(STEPS_KEPT)
        self.newest = 0
        """Number of the last step that was sent; 0 if none was."""

    def clear(self) -> None:
        """A new epoch counts from 1 again."""
        self._numbers[:] = 0
        self._active = ActiveTime()
        self._active_ns.clear()
        self.newest = 0

    def sent(self, step: Step, sent_ns: int) -> None:
        """A step goes to the stages."""
        where = step.number % STEPS_KEPT
        tokens = step.num_tokens
        self._numbers[where] = self.newest = step.number
        self._columns[where] = (sent_ns, 0, len(step.slots), tokens, tokens - step.num_decodes)

    def done(self, number: int, done_ns: int) -> None:
        """Its answer came."""
        where = number % STEPS_KEPT
        self._columns[where, DONE_NS] = done_ns
        self._active_ns.add_one(number, self._active.answered(int(self._columns[where, 0]), done_ns))

    def bubble_share(self, timings: StageTimings, first: int, last: int) -> float:
        """Of a stage, from the answer of step first - 1 to that of step last, as far as both are known."""
        last = min(last, self._active_ns.last, timings.busy_ns.last)
        busy, active = timings.busy_ns.between(first, last), self._active_ns.between(first, last)
        return 0.0 if busy is None or active is None else bubble_share(busy, active)

    def recent_bubble_share(self, timings: StageTimings) -> float:
        """Of a stage, over the steps answered in the last WINDOW_S."""
        last = self._active_ns.last
        first = max(1, last - STEPS_KEPT // 2)
        oldest_ns = time.monotonic_ns() - int(WINDOW_S * 1e9)
        # Not by numpy: a copy of the column would be some thousand times what is looked at.
        before = bisect_left(
            range(first, last + 1), oldest_ns, key=lambda number: self._columns[number % STEPS_KEPT, DONE_NS]
        )
        return self.bubble_share(timings, first + before, last)

    def of(self, numbers: Int64) -> tuple[Int64, Int64]:
        """[known] numbers and [known, 5] COLUMNS of those steps that are still kept."""
        where = numbers % STEPS_KEPT
        kept = self._numbers[where] == numbers
        return numbers[kept], self._columns[where[kept]]
