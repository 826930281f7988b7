"""What steps add up to, between any two of the last ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class StepSums:
    """A running sum by step number, so that the sum over consecutive steps is one subtraction.

    Args:
        size: How many of the last steps are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._until = np.zeros(size, np.int64)
        self.last = 0
        """Number of the newest step; 0 before the first."""
        self._total = 0

    def clear(self) -> None:
        """Steps count from 1 again."""
        self.last = self._total = 0

    def add(self, numbers: npt.NDArray[np.int64], amounts: npt.NDArray[np.int64]) -> None:
        """Take [n] consecutive steps, the first after the last one."""
        totals = self._total + amounts.cumsum()
        self._until[numbers % self._size] = totals
        self._total, self.last = int(totals[-1]), int(numbers[-1])

    def add_one(self, number: int, amount: int) -> None:
        """The same for one."""
        self._total += amount
        self._until[number % self._size] = self._total
        self.last = number

    def between(self, first: int, last: int) -> int | None:
        """The sum over steps first to last; None where one of them is not known, or not any more."""
        before = first - 1
        if not max(0, self.last - self._size + 1) <= before < last <= self.last:
            return None
        return int(self._until[last % self._size]) - (int(self._until[before % self._size]) if before else 0)
