"""How far a stage's clock is from the router's, told from messages that travel anyway."""

from __future__ import annotations

WINDOW_NS = 30 * 1_000_000_000
"""Bounds older than one to two windows are forgotten, for clocks drift: by some 10 µs a second."""
_LOWEST, _HIGHEST = -(1 << 62), 1 << 62


class ClockOffset:
    """The offset between two monotonic clocks, bounded from both sides.

    A message takes some time, and never a negative one. What comes from the stage bounds the offset from below,
    what goes to it from above; the quickest message of each direction decides. The estimate is the middle,
    and half the distance of the bounds is its error. On one host both clocks are the same, and the offset is 0
    within the error.
    """

    def __init__(self) -> None:
        self.offset_ns = 0
        """The stage's clock less ours."""
        self.error_ns: int | None = None
        """The offset is right within this; None while nothing is known."""
        self._began_ns = 0
        self._lower = (_LOWEST, _LOWEST)
        """The best bound of the window before this one, and of this one."""
        self._upper = (_HIGHEST, _HIGHEST)

    def clear(self) -> None:
        """The stage may be on another host now."""
        self.offset_ns, self.error_ns, self._began_ns = 0, None, 0
        self._lower, self._upper = (_LOWEST, _LOWEST), (_HIGHEST, _HIGHEST)

    def came(self, stage_ns: int, received_ns: int) -> None:
        """The stage sent something at `stage_ns` of its clock; it came at `received_ns` of ours."""
        self._turn(received_ns)
        self._lower = (self._lower[0], max(self._lower[1], stage_ns - received_ns))
        self._estimate()

    def went(self, sent_ns: int, arrival_ns: int) -> None:
        """We sent something at `sent_ns` of our clock; it came at `arrival_ns` of the stage's."""
        self._turn(sent_ns)
        self._upper = (self._upper[0], min(self._upper[1], arrival_ns - sent_ns))
        self._estimate()

    def _turn(self, now_ns: int) -> None:
        if now_ns - self._began_ns > WINDOW_NS:
            self._began_ns = now_ns
            self._lower = (self._lower[1], _LOWEST)
            self._upper = (self._upper[1], _HIGHEST)

    def _estimate(self) -> None:
        """Without bounds on both sides the last estimate stays."""
        lower, upper = max(self._lower), min(self._upper)
        if lower > _LOWEST and upper < _HIGHEST:
            self.offset_ns = (lower + upper) // 2
            self.error_ns = max(0, upper - lower) // 2
