"""How many steps a lane keeps in flight, and how large: by what steps have cost so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.cost_model import MIN_STEPS, CostModel, shape_of
from stagemesh.router.scheduler.limits import Limits
from stagemesh.router.scheduler.pipeline import Hops, PipelineTimes, choose_num_steps, cycle_s
from stagemesh.router.scheduler.prefill_budget import PrefillBudget

CHOICE_STEPS = 32
"""Steps after which the number in flight is looked at again, unless the load has become another one before."""
OTHER_LOAD = 2.0
"""So many times the rows, or as few: another load."""
BURST = 4
"""Prompts at hand that fill so many rounds of the most steps are a burst; it ends when they do not fill one step."""
PREFILL_PART = 8
"""One in so many positions of a full step is prefill's, however little time is left for it."""
CONSTANT_SHARE = 0.1
"""Of a step's constant time that rows answer for when steps are balanced: rows that cost next to nothing are
dealt by number then."""

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineState:
    """What the lane's pipeline does, as far as the router knows it."""

    num_microbatches: int
    """Steps of decodes in flight (M)."""
    max_in_flight: int
    """Unanswered steps at most, now."""
    step_s: tuple[float, ...]
    """[stages] predicted, of a step of decodes; empty while too little is known."""
    limiting_stage: int
    """The one whose steps take longest."""
    cycle_s: float
    """Predicted between two tokens of a sequence; 0 while too little is known."""
    ring_s: float
    """Hops once round the stages, without the stages, on average."""
    trip_s: float
    """Hops from the router through the stages and back."""
    itl_p95_s: float
    """Measured over the window of the target; 0 without a target."""


class Allowance:
    """What is left of one step for prefill."""

    def __init__(self, costs: CostModel, left_s: list[float] | None, floor: int, enough: int) -> None:
        self._costs = costs
        self._left_s = left_s
        self._floor = floor
        self._enough = enough
        self._spent = False

    def most(self, start: int, remaining: int) -> int:
        """Positions that the next chunk may have.

        Args:
            start: Where it begins in its sequence.
            remaining: Positions of its prompt from there on.
        """
        if self._left_s is None:
            return remaining
        fitting = self._costs.positions_within(self._left_s, start)
        if not self._spent:
            return min(max(fitting, self._floor), remaining)
        # A few positions more are not worth a chunk with all the context behind it.
        return min(fitting, remaining) if fitting >= min(remaining, self._enough) else 0

    def spend(self, start: int, count: int) -> None:
        """A chunk was taken."""
        self._spent = True
        if self._left_s is not None:
            taken_s = self._costs.chunk_seconds(start, count)
            self._left_s = [max(left - taken, 0.0) for left, taken in zip(self._left_s, taken_s, strict=True)]


class Pace:
    """Learns what steps cost, and chooses how many are in flight and what each may cost.

    Args:
        limits: Of the lane.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.costs = CostModel(limits.num_stages)
        self.times = PipelineTimes(limits.num_stages)
        self.budget = PrefillBudget(limits.itl_target_s, limits.num_stages)
        self.num_microbatches = limits.num_microbatches
        self.max_in_flight = limits.depth
        if limits.max_microbatches:
            self.max_in_flight = self._in_flight(0)
        self._hops, self._hops_known = Hops(), 0
        self._num_rows = 0
        self._streaming = False
        """Whether any of the rows can have had a token, so that there is an inter-token time to keep."""
        self._context = 0
        self._prompts = self._backlog = 0
        self._chosen_for = (0, False)
        """(rows, whether there was a burst of prompts) when the number in flight was looked at last."""
        self._ratio = 0.0
        """What a KV cell weighs against a row."""

    # What happens

    def sent(
        self,
        number: int,
        rows: int,
        context: int,
        starts: Int64,
        counts: Int64,
        newest_input: int,
        now: float,
    ) -> None:
        """A step was made."""
        self.times.sent(number, shape_of(rows, context, starts, counts), newest_input, now)
        if number % CHOICE_STEPS == 0:
            self._choose()

    def answered(self, number: int, now: float) -> None:
        """Its result came."""
        self.times.answered(number, now)
        self._streaming = self._num_rows > 0

    def reported(self, stage: int, numbers: Int64, times_ns: Int64) -> None:
        """A stage said where the time of some steps went."""
        self.costs.observe(stage, *self.times.reported(stage, numbers, times_ns))

    def running(self, num_rows: int, context: int | None, prompts: int, backlog: int) -> None:
        """How many sequences decode, now and then the KV cells that they read in all, and how many prompts with how many
        positions could be computed now."""
        self._num_rows, self._prompts, self._backlog = num_rows, prompts, backlog
        self._streaming = self._streaming and num_rows > 0
        if context is not None:
            self._context = context
        rows, burst = self._chosen_for
        if burst != self._burst(burst):
            if burst:
                self.times.begin_anew()
            self._choose()
        elif not rows <= OTHER_LOAD * num_rows <= OTHER_LOAD**2 * rows:
            self._choose()

    # What follows

    def row_weights(self, positions: Int64) -> Float64:
        """[rows] what each costs, in terms of one without context."""
        weights: Float64 = 1.0 + np.multiply(self._ratio, positions, dtype=np.float64)
        return weights

    def weight(self, positions: Int64, rows: Int64) -> float:
        """What rows cost together, in the same terms.

        Args:
            positions: [slots]
            rows: Indices of those that count.
        """
        return len(rows) + self._ratio * float(positions[rows].sum()) if self._ratio else float(len(rows))

    def allowance(self, rows: int, context: int) -> Allowance:
        """What a step with these decodes may carry of prefill.

        Args:
            rows: That decode in it.
            context: KV cells they read.
        """
        floor = self._limits.step_tokens // PREFILL_PART
        if self.budget.has_target:
            floor = min(floor, self._limits.block_size)
        if not self._streaming or not self.costs.ready:
            return Allowance(self.costs, None, max(floor, 1), self._limits.block_size)
        usual_s = self.costs.predict(self._decodes())
        waits = max(self.num_microbatches, float(usual_s.sum() / max(usual_s.max(), 1e-9)))
        _, _, positions, _, pairs = self.times.recent_shape()
        at_hand = self.costs.prefill_seconds(
            self._backlog, self._backlog**2 / (2 * self._prompts) if self._prompts else 0.0
        )
        lately = self.costs.prefill_seconds(positions, pairs)
        allowed_s = self.budget.step_s(usual_s, waits, self._hops.ring, at_hand, lately)
        none = np.zeros(0, np.int64)
        left_s = np.maximum(allowed_s - self.costs.predict(shape_of(rows, context, none, none)), 0.0)
        return Allowance(self.costs, left_s.tolist(), max(floor, 1), self._limits.block_size)

    def state(self) -> PipelineState:
        """For people."""
        known = self.costs.ready
        step_s = self.costs.predict(self._decodes()) if known else np.zeros(0)
        hops = self.times.hops()
        return PipelineState(
            num_microbatches=self.num_microbatches,
            max_in_flight=self.max_in_flight,
            step_s=tuple(step_s.tolist()),
            limiting_stage=int(step_s.argmax()) if known else 0,
            cycle_s=cycle_s(step_s, self.num_microbatches, hops, self._limits.lookahead) if known else 0.0,
            ring_s=hops.usual_ring,
            trip_s=hops.trip,
            itl_p95_s=self.budget.p95_s(),
        )

    @property
    def _plenty(self) -> int:
        """Positions of prompts that fill any number of steps in flight."""
        return self._limits.step_tokens * self._limits.max_microbatches

    def _burst(self, before: bool) -> bool:
        return self._backlog >= (self._limits.step_tokens if before else BURST * self._plenty)

    def _choose(self) -> None:
        """Look again at how many steps should be in flight."""
        self._chosen_for = (self._num_rows, self._burst(self._chosen_for[1]))
        if not self.costs.ready:
            return
        self.costs.settle()
        if self.times.num_reports != self._hops_known:
            self._hops, self._hops_known = self.times.hops(), self.times.num_reports
        if self._limits.max_microbatches and self._num_rows:
            counts = np.arange(1, self._limits.max_microbatches + 1)
            shapes = self._shapes(counts)
            step_s = self.costs.predict(shapes)
            work = self._num_rows + counts * shapes[:, 2]
            self.num_microbatches = choose_num_steps(
                step_s, work, self.num_microbatches, self._hops, self._limits.lookahead
            )
            chosen_s = step_s[self.num_microbatches - 1]
            cycle = cycle_s(chosen_s, self.num_microbatches, self._hops, self._limits.lookahead)
            through = float(chosen_s.sum()) + self._hops.trip
            self.max_in_flight = self._in_flight(through / cycle * self.num_microbatches)
        usual_s = self.costs.predict(self._decodes())
        constant, row, _, cell, _ = self.costs.coefficients[int(usual_s.argmax())]
        row += CONSTANT_SHARE * constant * self.num_microbatches / max(self._num_rows, 1)
        self._ratio = float(cell / row) if row > 0 else 0.0

    def _in_flight(self, on_the_way: float) -> int:
        """Unanswered steps to allow, if so many at a time are on their way through the stages and back: half a
        step more at least lies ready at the first stage."""
        wanted = self.num_microbatches
        if self._limits.lookahead:
            wanted = max(wanted + 1, math.ceil(on_the_way + 0.5))
        return min(wanted, self._limits.depth)

    def _decodes(self) -> Float64:
        """[terms] of a step that is one share of the decodes, without prefill."""
        share = self.num_microbatches
        return np.array([1.0, max(self._num_rows / share, 1.0), 0.0, self._context / share, 0.0])

    def _shapes(self, counts: Int64) -> Float64:
        """[counts, terms] of a step if so many are in flight: they share the decodes, and the prefill that runs
        beside them unless there is enough of it to fill any number of steps."""
        shapes = np.tile(self.times.recent_shape(), (len(counts), 1))
        if self.budget.has_target or self._backlog < self._plenty:
            shapes *= (self.num_microbatches / counts)[:, None]
        elif self._chosen_for[1]:
            shapes[:, 2] = np.maximum(shapes[:, 2], self._limits.step_tokens)
        shapes[:, 0] = 1.0
        shapes[:, 1] = np.maximum(self._num_rows / counts, 1.0)
        shapes[:, 3] = self._context / counts
        return shapes


def preload() -> None:
    """Choose once for a lane that is nobody's: what numpy loads when it is used first takes tens of milliseconds, which no
    step should find in its way."""
    limits = Limits(
        num_blocks=1,
        block_size=1,
        max_slots=1,
        max_blocks=1,
        max_waiting=1,
        step_tokens=1,
        num_stages=2,
        num_microbatches=2,
        max_microbatches=4,
        depth=5,
        lookahead=1,
    )
    pace, none = Pace(limits), np.zeros(0, np.int64)
    for number in range(1, MIN_STEPS + 1):
        pace.sent(number, 1, 1, none, none, number - 1, float(number))
        pace.answered(number, number + 0.5)
        for stage in range(limits.num_stages):
            pace.reported(stage, np.array([number]), np.array([[number, 0, 1, 1, 1000, 1]]))
    pace.running(1, 1, 0, 0)
    pace.state()
