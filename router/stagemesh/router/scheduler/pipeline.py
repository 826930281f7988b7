"""How the steps of a lane follow each other, and how many should be in flight.

Everything is worked out from what the router knows (when it sent a step and got its result) and what stages
report on their own clocks. Clocks of two hosts are never compared: differences between them cancel once round
the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

STEPS_KEPT = 512
ARRIVAL, QUEUE, WAIT, RECEIVE, COMPUTE, SEND = range(6)
"""Columns of the times that stages report."""
WINDOW = 256
"""Steps that averages are made of."""
RECENT = 64
"""Steps that the present load is taken from."""
GAIN = 0.03
"""A change of the number in flight must promise so much, or things go back and forth."""


@dataclass(frozen=True, slots=True)
class Hops:
    """What a token's way costs beside the stages, in seconds."""

    ring: float = 0.0
    """Once round: from stage to stage and back to stage 0."""
    trip: float = 0.0
    """From the router through all stages and back to it."""


def cycles_s(step_s: Float64, num_steps: Int64, hops: Hops, lookahead: int) -> Float64:
    """[choices] seconds in which each of the steps in flight runs once, for several numbers of them.

    The slowest stage runs them one after the other; a step's tokens must be back before it runs again, over
    the ring, and the router must have seen all but `lookahead` of them.

    Args:
        step_s: [choices, stages] of one step.
        num_steps: [choices] in flight (M).
        hops: Of the lane.
        lookahead: Steps sent ahead of their results.
    """
    through = step_s.sum(axis=1)
    cycles: Float64 = np.maximum(num_steps * step_s.max(axis=1), (through + hops.trip) / (lookahead + 1))
    return np.maximum(cycles, through + hops.ring) if lookahead else cycles


def cycle_s(step_s: Float64, num_steps: int, hops: Hops, lookahead: int) -> float:
    """The same for one number of them; step_s is [stages]."""
    return float(cycles_s(step_s[None], np.array([num_steps]), hops, lookahead)[0])


def choose_num_steps(step_s: Float64, work: Float64, current: int, hops: Hops, lookahead: int) -> int:
    """The number of steps in flight that gets most done.

    Args:
        step_s: [most, stages]: row m - 1 is a step's time on each stage if m are in flight.
        work: [most] positions that m steps compute.
        current: Stays unless another is better by GAIN.
        hops: Of the lane.
        lookahead: Steps sent ahead of their results.
    """
    rates = work / cycles_s(step_s, np.arange(1, len(step_s) + 1), hops, lookahead)
    best = int(rates.argmax()) + 1
    if current <= len(rates) and rates[current - 1] * (1 + GAIN) >= rates[best - 1]:
        return current
    return best


class PipelineTimes:
    """The last STEPS_KEPT steps of a lane, by number.

    Args:
        num_stages: Of the lane.
    """

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self._numbers = np.zeros(STEPS_KEPT, np.int64)
        self._shapes = np.zeros((STEPS_KEPT, 5))
        self._inputs = np.zeros(STEPS_KEPT, np.int64)
        self._sent_at = np.zeros(STEPS_KEPT)
        self._round_trip = np.zeros(STEPS_KEPT)
        self._known = np.zeros((STEPS_KEPT, num_stages), np.bool_)
        self._begin = np.zeros((STEPS_KEPT, num_stages))
        self._end = np.zeros((STEPS_KEPT, num_stages))
        self._wait = np.zeros((STEPS_KEPT, num_stages))
        self._before = np.zeros((STEPS_KEPT, num_stages))
        self._newest = 0
        self._recent, self._recent_at, self._recent_from = np.zeros(self._shapes.shape[1]), 0, 0

    def sent(self, number: int, shape: Float64, newest_input: int, now: float) -> None:
        """A step is on its way; it takes tokens of steps up to `newest_input`."""
        where = number % STEPS_KEPT
        self._numbers[where] = number
        self._shapes[where] = shape
        self._inputs[where] = newest_input
        self._sent_at[where] = now
        self._round_trip[where] = 0.0
        self._known[where] = False
        self._newest = number

    def answered(self, number: int, now: float) -> None:
        """Its result is here."""
        where = number % STEPS_KEPT
        if self._numbers[where] == number:
            self._round_trip[where] = now - self._sent_at[where]

    def reported(self, stage: int, numbers: Int64, times_ns: Int64) -> tuple[Float64, Float64]:
        """Take a stage's report; returns [n, terms] shapes and [n] seconds each took of it, of the steps that are
        still kept."""
        where = numbers % STEPS_KEPT
        kept = self._numbers[where] == numbers
        where, times_ns = where[kept], times_ns[kept]
        before = times_ns[:, QUEUE] + times_ns[:, WAIT]
        busy = times_ns[:, RECEIVE] + times_ns[:, COMPUTE] + times_ns[:, SEND]
        begin = times_ns[:, ARRIVAL] + before
        self._known[where, stage] = True
        # Nanoseconds of an unknown clock fit a float to a microsecond at worst.
        self._begin[where, stage] = begin * 1e-9
        self._end[where, stage] = (begin + busy) * 1e-9
        self._wait[where, stage] = times_ns[:, WAIT] * 1e-9
        self._before[where, stage] = before * 1e-9
        shapes: Float64 = self._shapes[where]
        seconds: Float64 = busy / 1e9
        return shapes, seconds

    def hops(self) -> Hops:
        """What the hops of the last steps took."""
        where = self._window()
        if not len(where):
            return Hops()
        begin, end, wait = self._begin[where], self._end[where], self._wait[where]
        known = self._known[where]
        ring = 0.0
        # Only a stage that waited shows when its input came; one that was busy shows its own pace.
        shows = known[:, 1:] & known[:, :-1] & (wait[:, 1:] > 0)
        if self.num_stages > 1:
            gaps = np.where(shows, begin[:, 1:] - end[:, :-1], 0.0).sum(axis=0)
            ring = float((gaps / np.maximum(shows.sum(axis=0), 1)).sum())
            source = self._inputs[where] % STEPS_KEPT
            back = (
                known[:, 0]
                & (wait[:, 0] > 0)
                & (self._numbers[source] == self._inputs[where])
                & self._known[source, -1]
            )
            if back.any() and shows.any(axis=0).all():
                ring += float((begin[:, 0] - self._end[source, -1])[back].mean())
            # Without a pair for each hop the clocks do not cancel.
            else:
                ring = 0.0
        whole = known.all(axis=1) & (self._round_trip[where] > 0)
        if not whole.any():
            return Hops(max(ring, 0.0), 0.0)
        busy = (end - begin)[whole].sum(axis=1)
        trips = self._round_trip[where][whole] - self._before[where][whole, 0] - busy
        return Hops(max(ring, 0.0), max(float(np.percentile(trips, 20)), 0.0))

    def recent_shape(self) -> Float64:
        """[terms] of the last steps, on average."""
        if self._recent_at != self._newest:
            where = self._window(min(RECENT, self._newest - self._recent_from))
            self._recent = self._shapes[where].mean(axis=0) if len(where) else np.zeros(self._shapes.shape[1])
            self._recent_at = self._newest
        return self._recent.copy()

    def begin_anew(self) -> None:
        """The load has become another one: steps so far say nothing of those to come."""
        self._recent_from, self._recent_at = self._newest, 0

    def _window(self, count: int = WINDOW) -> Int64:
        numbers = np.arange(max(1, self._newest - count + 1), self._newest + 1)
        where = numbers % STEPS_KEPT
        kept: Int64 = where[self._numbers[where] == numbers]
        return kept
