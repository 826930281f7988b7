"""When a step begins and ends on each stage, in virtual time.

Stages run the steps in order, so nothing need be simulated but the steps: a step begins on a stage at the
latest of its own arrival, its inputs' arrival and the end of the step before, and all of these are known when
the step is made. Over the stages that is a recurrence of maxima and sums, done for all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagemesh.model.cost import VARIABLES, CostModel, StepShape
from stagemesh.router.simulate.spec import Link

Int64 = npt.NDArray[np.int64]
TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of one step, virtual nanoseconds."""

    arrival: int
    """Of the step itself; the same on all."""
    free: Int64
    """[stages] when the stage had the step and nothing before it."""
    begins: Int64
    """[stages]"""
    ends: Int64
    """[stages]"""


class VirtualPipeline:
    """The stages of a lane and what connects them.

    Args:
        costs: Of each stage.
        links: Between neighbours, one fewer.
        ring: From the last stage to the first; with one stage the tokens stay where they are.
        position_bytes: That a link carries for each position of a step.
    """

    def __init__(
        self, costs: Sequence[CostModel], links: Sequence[Link], ring: Link, position_bytes: int
    ) -> None:
        count = len(costs)
        self._coefficients = np.zeros((count, 1 + len(VARIABLES)))
        for stage, cost in enumerate(costs):
            for value, variable in cost.terms:
                self._coefficients[stage, VARIABLES.index(variable) + 1 if variable else 0] += value
        self.uses_context = bool(self._coefficients[:, 1 + VARIABLES.index("context")].any())
        """Whether a step's cost depends on its KV positions."""
        self._constant = not self._coefficients[:, 1:].any()
        self._fixed_costs = np.rint(self._coefficients[:, 0]).astype(np.int64)
        self._latencies = np.array([0, *(link.latency for link in links)], np.int64)
        rates = [0.0, *(position_bytes * 1e9 / link.bandwidth if link.bandwidth else 0.0 for link in links)]
        self._position_ns = np.array(rates)
        self._limited = bool(self._position_ns.any())
        self._fixed_before = self._before(self._fixed_costs, self._latencies)
        self._ring = ring if count > 1 else None
        self._free_at = np.zeros(count, np.int64)
        self._sampled_at = [0]
        """By step number: when its tokens are on stage 0."""
        self.busy_ns = np.zeros(count, np.int64)
        """Sum of the costs so far."""

    @property
    def num_stages(self) -> int:
        """Of the lane."""
        return len(self._free_at)

    def run(self, number: int, shape: StepShape, arrival_ns: int, newest_input: int) -> StepTimes:
        """Run the next step.

        Args:
            number: Consecutive, from 1.
            shape: What its cost depends on.
            arrival_ns: At every stage.
            newest_input: The latest step whose tokens it takes; 0: none.
        """
        assert number == len(self._sampled_at)
        if self._constant and not self._limited:
            costs, before = self._fixed_costs, self._fixed_before
        else:
            hops = self._latencies
            if self._limited:
                hops = hops + np.rint(self._position_ns * shape.tokens).astype(np.int64)
            costs = self._costs(shape)
            before = self._before(costs, hops)
        free = np.maximum(self._free_at, arrival_ns)
        # begin[s] = max(free[s], end[s-1] + hop[s]), with the tokens of stage 0 there too: with the running sums of
        # costs and hops taken off, it is a running maximum.
        ready = free - before
        ready[0] = max(int(ready[0]), self._sampled_at[newest_input])
        begins = np.maximum.accumulate(ready) + before
        ends = begins + costs
        self._free_at = ends
        self.busy_ns += costs
        last = int(ends[-1])
        if self._ring is not None:
            last += self._ring.nanoseconds(TOKEN_BYTES * shape.rows)
        self._sampled_at.append(last)
        return StepTimes(arrival_ns, free, begins, ends)

    @staticmethod
    def _before(costs: Int64, hops: Int64) -> Int64:
        """[stages] from the begin of a step on the first stage to its begin on each, if nothing holds it up."""
        before: Int64 = np.cumsum(costs + hops) - costs
        return before

    def _costs(self, shape: StepShape) -> Int64:
        if self._constant:
            return self._fixed_costs
        values = np.array((1, *(getattr(shape, variable) for variable in VARIABLES)), np.float64)
        return np.rint(self._coefficients @ values).astype(np.int64)
