"""How much prefill a step may carry beside its decodes.

Steps in flight should cost the same, or they wait for each other: each carries an equal part of the prefill at
hand. The more there is of it, the more a step may take. An inter-token target, if there is one, bounds what a step
may cost; what is measured corrects what was predicted.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

BACKLOG_STEPS, MOST_BACKLOG_STEPS = 3, 12
"""Steps that the prefill at hand is dealt over, for each stage and at most. Few would end it sooner, and make steps of very
unequal cost follow each other, which leaves gaps on every stage behind the first; steps that carry all they can hold are equal
again. The fewer the stages the less there is to leave a gap on, and every step more costs what a step costs in any case."""
EVEN = 0.25
"""Of a step of decodes: steps that differ by less are as good as equal. What positions seem to cost where they cost next
to nothing is noise, and no reason to make a burst of short prompts wait."""
WINDOW_S = 10.0
"""Of the inter-token times that the target is held over."""
CONTROL_S = 0.5
"""Between two corrections, each by the last CONTROL_S alone: the whole window would answer too late."""
ROWS_SAMPLED = 32
"""Inter-token times kept of a step; its rows differ little."""
PERCENTILE = 95


class PrefillBudget:
    """Decides what a step may cost.

    Args:
        itl_target_s: Inter-token time that 95% should keep within; 0: no target.
        num_stages: That steps pass.
    """

    def __init__(self, itl_target_s: float, num_stages: int) -> None:
        self._target_s = itl_target_s
        self._backlog_steps = min(BACKLOG_STEPS * num_stages, MOST_BACKLOG_STEPS)
        self._factor = 0.8  # until measured: what is predicted leaves out what is not known yet
        self._recent: deque[tuple[float, Float64]] = deque()
        self._corrected_at = 0.0
        self._held_back = self._gives = False
        """Since then: whether a step got less prefill than it would have without the target, and whether one could get
        more than what is prefill's in any case."""

    @property
    def has_target(self) -> bool:
        """Whether there is an inter-token target to hold."""
        return self._target_s > 0

    def observe(self, intervals_s: Float64, now: float) -> None:
        """[rows] seconds since each row's last token."""
        stride = -(-len(intervals_s) // ROWS_SAMPLED)
        if stride:
            self._recent.append((now, intervals_s[::stride].copy()))
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()
        if now - self._corrected_at >= CONTROL_S:
            self._correct(now)

    def p95_s(self, since: float = 0.0) -> float:
        """Of the inter-token times of the window, or of those after `since`; 0 if there are none."""
        values = [part for at, part in self._recent if at >= since]
        return float(np.percentile(np.concatenate(values), PERCENTILE)) if values else 0.0

    def step_s(
        self, decode_s: Float64, num_steps: float, ring_s: float, backlog_s: float, lately_s: float
    ) -> float:
        """Seconds that a step may take of any stage.

        Args:
            decode_s: [stages] of a step of decodes alone.
            num_steps: That a token waits for: steps in flight, or stages it passes, in terms of the slowest.
            ring_s: Hops once round.
            backlog_s: Seconds that the prompts which could be computed now take of the slowest stage.
            lately_s: Seconds of prefill that steps had on average of late: as much costs no evenness.
        """
        slowest = float(decode_s.max())
        allowed = slowest + max(EVEN * slowest, backlog_s / self._backlog_steps, lately_s)
        if self.has_target:
            bound = self._factor * max(self._target_s - ring_s, 0.0) / num_steps
            self._held_back |= bound < allowed
            self._gives |= bound > slowest
            allowed = min(allowed, bound)
        return allowed

    def _correct(self, now: float) -> None:
        """Only as far as it makes a difference, lest the next load finds a factor that has run away."""
        measured = self.p95_s(now - CONTROL_S)
        if measured > 0.95 * self._target_s and self._gives:
            self._factor *= max(0.7, 0.9 * self._target_s / measured)
        elif self._held_back and max(measured, self.p95_s()) < 0.9 * self._target_s:
            self._factor = min(2.0, self._factor * 1.1)
        self._corrected_at, self._held_back, self._gives = now, False, False
