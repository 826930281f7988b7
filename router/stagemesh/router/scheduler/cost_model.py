"""What a step costs on each stage, learnt from what the stages report.

The time of a step is taken for a sum of terms, none negative: a constant (reading the weights), so much for
each decoding row, each position of a prompt, each KV cell read, and each pair of a prompt's position and a cell
before it. The coefficients follow by least squares over the last steps, older ones forgotten gradually.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

SCALES = np.array([1.0, 64.0, 256.0, 16_384.0, 65_536.0])
"""What is a usual amount of each term of a shape, so that all are of one order."""
NUM_TERMS = len(SCALES)
FORGETTING = 0.998
"""Weight of a step against the next one: 500 steps count."""
MIN_STEPS = 8
"""Of a stage, before its times are predicted."""
OUTLIER = 4.0
"""A step that took more than so many times the prediction counts as that many: a hiccup is not a cost, and a
stage that has become slower is believed after a few steps all the same."""
RIDGE = 1e-6


def shape_of(rows: int, context: int, starts: Int64, counts: Int64) -> Float64:
    """[terms] of a step.

    Args:
        rows: That decode.
        context: KV cells they read in all.
        starts: [chunks] where each chunk of a prompt begins.
        counts: [chunks] its positions.
    """
    if not len(counts):
        return np.array([1.0, rows, 0.0, context, 0.0])
    cells = context + float((starts + counts).sum())
    pairs = float((counts * (starts + counts / 2)).sum())
    return np.array([1.0, rows, counts.sum(), cells, pairs])


class CostModel:
    """Learns and predicts the step times of a lane.

    Args:
        num_stages: Of the lane.
    """

    def __init__(self, num_stages: int) -> None:
        self._gram = np.zeros((num_stages, NUM_TERMS, NUM_TERMS))
        self._moment = np.zeros((num_stages, NUM_TERMS))
        self._num_steps = np.zeros(num_stages, np.int64)
        self._coefficients = np.zeros((num_stages, NUM_TERMS))
        self._rows: list[list[float]] = self._coefficients.tolist()
        """The same for the arithmetic of one prompt, for which numpy takes longer unless the stages are many."""
        self._stale = False
        self._expected = np.zeros((num_stages, NUM_TERMS))
        """What outliers are told by. Not the coefficients, which are also solved for when somebody looks: what is
        learnt must follow from what happened alone, or a log of it could not be replayed."""

    @property
    def ready(self) -> bool:
        """Whether every stage has reported enough steps to predict from."""
        return bool((self._num_steps >= MIN_STEPS).all())

    @property
    def coefficients(self) -> Float64:
        """[stages, terms] seconds for one of each term."""
        self._refresh()
        return self._coefficients

    def observe(self, stage: int, shapes: Float64, seconds: Float64) -> None:
        """Steps that a stage has done.

        Args:
            stage: Its place in the lane.
            shapes: [steps, terms], the oldest first.
            seconds: [steps] that each took of the stage, all but waiting.
        """
        if not len(shapes):
            return
        if self._num_steps[stage] >= MIN_STEPS:
            if not self._expected[stage].any():
                self.settle()
            expected = shapes @ self._expected[stage]
            seconds = np.minimum(seconds, OUTLIER * np.maximum(expected, 1e-6))
        scaled = shapes / SCALES
        weights = FORGETTING ** np.arange(len(shapes) - 1, -1, -1)
        weighted = scaled * weights[:, None]
        self._gram[stage] = self._gram[stage] * FORGETTING ** len(shapes) + weighted.T @ scaled
        self._moment[stage] = self._moment[stage] * FORGETTING ** len(shapes) + weighted.T @ seconds
        self._num_steps[stage] += len(shapes)
        self._stale = True

    def settle(self) -> None:
        """From now on, tell outliers by what is known now."""
        self._expected = self.coefficients

    def predict(self, shapes: Float64) -> Float64:
        """[..., stages] seconds that steps of these shapes, [..., terms], take of each stage."""
        predicted: Float64 = shapes @ self.coefficients.T
        return predicted

    def positions_within(self, budgets: Sequence[float], start: int) -> int:
        """How many positions of a prompt fit what is left of a step.

        Args:
            budgets: [stages] seconds left on each.
            start: Cells before the chunk.
        """
        fitting = float(1 << 30)
        for budget, (_, _, position, cell, pair) in zip(budgets, self._by_stage(), strict=True):
            # The cost of n positions is square * n² + linear * n + cell * start.
            square, linear = pair / 2, position + cell + pair * start
            rest = max(budget - cell * start, 0.0)
            root = math.sqrt(linear * linear + 4 * square * rest)
            if linear + root > 0:
                fitting = min(fitting, 2 * rest / (linear + root))
        return int(fitting)

    def prefill_seconds(self, positions: float, pairs: float) -> float:
        """Seconds that prefill takes of the stage that it takes most of. Where all prompts have one length, pairs are to
        positions as that length to 2, and either term may have been found to carry the cost of both."""
        return float((self.coefficients[:, [2, 4]] @ (positions, pairs)).max())

    def chunk_seconds(self, start: int, count: int) -> list[float]:
        """[stages] seconds that a chunk adds to a step."""
        return [
            position * count + cell * (start + count) + pair * count * (start + count / 2)
            for _, _, position, cell, pair in self._by_stage()
        ]

    def _by_stage(self) -> list[list[float]]:
        """[stages][terms] the coefficients."""
        self._refresh()
        return self._rows

    def _refresh(self) -> None:
        """Solve again if steps were observed since."""
        if self._stale:
            self._coefficients = self._solve() / SCALES
            self._rows = self._coefficients.tolist()
            self._stale = False

    def _solve(self) -> Float64:
        """Least squares; terms that come out negative are left out, and the rest is solved again."""
        usable = np.ones(self._moment.shape, np.bool_)
        identity = np.eye(NUM_TERMS)
        scale = np.maximum(np.trace(self._gram, axis1=1, axis2=2), 1e-9) / NUM_TERMS
        ridge = RIDGE * scale[:, None, None] * identity
        solution = np.zeros(self._moment.shape)
        for _ in range(NUM_TERMS):
            both = usable[:, :, None] & usable[:, None, :]
            gram = np.where(both, self._gram + ridge, identity)
            moment = np.where(usable, self._moment, 0.0)
            solution = np.linalg.solve(gram, moment[:, :, None])[:, :, 0]
            worst = solution.argmin(axis=1)
            negative = np.flatnonzero(solution.min(axis=1) < 0)
            if not len(negative):
                break
            usable[negative, worst[negative]] = False
        return np.maximum(solution, 0.0)
