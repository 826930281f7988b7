"""What the lane remembers of the steps it sent: when, when the answer came, what was in them."""

from __future__ import annotations

import numpy as np

from stagemesh.router.lane.timings import STEPS_KEPT, Int64
from stagemesh.router.scheduler import Step

COLUMNS = ("sent_ns", "done_ns", "rows", "tokens", "prefill_tokens")
"""Times are the router's monotonic clock; done_ns is 0 while there is no answer."""


class StepRecords:
    """A ring of the last STEPS_KEPT steps of an epoch, by step number."""

    def __init__(self) -> None:
        self._numbers = np.zeros(STEPS_KEPT, np.int64)
        self._columns = np.zeros((STEPS_KEPT, len(COLUMNS)), np.int64)

    def clear(self) -> None:
        """A new epoch counts from 1 again."""
        self._numbers[:] = 0

    def sent(self, step: Step, sent_ns: int) -> None:
        """A step goes to the stages."""
        where = step.number % STEPS_KEPT
        tokens = step.num_tokens
        self._numbers[where] = step.number
        self._columns[where] = (sent_ns, 0, len(step.slots), tokens, tokens - step.num_decodes)

    def done(self, number: int, done_ns: int) -> None:
        """Its answer came."""
        self._columns[number % STEPS_KEPT, 1] = done_ns

    def of(self, numbers: Int64) -> tuple[Int64, Int64]:
        """[known] numbers and [known, 5] COLUMNS of those steps that are still kept."""
        where = numbers % STEPS_KEPT
        kept = self._numbers[where] == numbers
        return numbers[kept], self._columns[where[kept]]
