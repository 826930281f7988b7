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
QUICK = 0.1
"""Share of the samples of a hop that are quicker than what it is taken for. What is slower has waited for something
else too: for a processor, or in a queue. The number in flight must not follow from that, since it makes queues."""
RECENT = 64
"""Steps that the present load is taken from."""
GAIN = 0.03
"""A change of the number in flight must promise so much, or things go back and forth."""


@dataclass(frozen=True, slots=True)
class Hops:
    """What a token's way costs beside the stages, in seconds."""

    ring: float = 0.0
    """Once round: from stage to stage and back to stage 0, where nothing else holds a token up."""
    trip: float = 0.0
    """From the router through all stages and back to it, where nothing else does."""
    usual_ring: float = 0.0
    """Once round, on average, whatever held it up."""


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
        self._times = np.zeros((num_stages, STEPS_KEPT, 4))
        """Seconds: when it began and ended by the stage's clock, waited for its input, and waited in all."""
        self._newest = 0
        self.num_reports = 0
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
        values = np.stack((begin, begin + busy, times_ns[:, WAIT], before), axis=1)
        self._times[stage, where] = values * 1e-9
        self.num_reports += 1
        shapes: Float64 = self._shapes[where]
        seconds: Float64 = busy / 1e9
        return shapes, seconds

    def hops(self) -> Hops:
        """What the hops of the last steps took."""
        where = self._window()
        if not len(where):
            return Hops()
        begin, end, wait, before = np.moveaxis(self._times[:, where], 2, 0)
        known = self._known[where].T
        gaps = np.empty_like(begin)
        gaps[1:] = begin[1:] - end[:-1]
        # Only a stage that waited shows when its input came; one that was busy shows its own pace.
        shows = known & (wait > 0)
        shows[1:] &= known[:-1]
        source = self._inputs[where] % STEPS_KEPT
        gaps[0] = begin[0] - self._times[-1, source, 1]
        shows[0] &= (self._numbers[source] == self._inputs[where]) & self._known[source, -1]
        counts = shows.sum(axis=1)
        ring = usual = 0.0
        # Without a sample of each hop the clocks do not cancel.
        if self.num_stages > 1 and counts.all():
            usual = float((np.where(shows, gaps, 0.0).sum(axis=1) / counts).sum())
            ordered = np.sort(np.where(shows, gaps, np.inf), axis=1)
            ring = float(ordered[np.arange(self.num_stages), (counts * QUICK).astype(np.int64)].sum())
        whole = known.all(axis=0) & (self._round_trip[where] > 0)
        trip = 0.0
        if whole.any():
            busy = (end - begin)[:, whole].sum(axis=0)
            trips = self._round_trip[where][whole] - before[0, whole] - busy
            trip = float(np.sort(trips)[(len(trips) - 1) // 5])
        return Hops(max(ring, 0.0), max(trip, 0.0), max(usual, 0.0))

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
