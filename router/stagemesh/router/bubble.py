"""The bubble share: of the time in which the lane had a step in flight, the part in which a stage had nothing to do.

A step is in flight from when the router sent it until its result was back; what a stage does with it is receive,
compute and send. This is the only definition: `stagemesh status`, `top`, `trace` and `simulate`, the metrics and
`plan` use it over different times. docs/observability.md#bubble-share
"""

from __future__ import annotations


class ActiveTime:
    """Adds up the time with a step in flight; results come in the order in which steps were sent."""

    def __init__(self) -> None:
        self.total_ns = 0
        self._answered_ns = 0

    def answered(self, sent_ns: int, done_ns: int) -> int:
        """The oldest step in flight was sent then, and its result is here; returns what that adds."""
        added = done_ns - max(sent_ns, self._answered_ns)
        self.total_ns += added
        self._answered_ns = done_ns
        return added


def bubble_share(busy: float, active: float) -> float:
    """0 to 1; 0 where there was nothing to do for anybody.

    Args:
        busy: Time a stage had a step in hand.
        active: Time with a step in flight, in the same unit.
    """
    return min(1.0, max(0.0, 1.0 - busy / active)) if active > 0 else 0.0
