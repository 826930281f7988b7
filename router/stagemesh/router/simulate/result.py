"""What a simulation says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of times in milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of_ns(cls, times: npt.NDArray[np.int64]) -> Percentiles:
        """Zeros where there are no times."""
        values = np.percentile(times, PERCENTILES) / 1e6 if len(times) else np.zeros(len(PERCENTILES))
        return cls(p50=float(values[0]), p90=float(values[1]), p99=float(values[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One stage."""

    layers: int
    """0 where costs were given and not layers."""
    busy_share: float
    """Of the whole time."""
    bubble_share: float
    """Over the whole run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """One run."""

    name: str
    virtual_s: float
    """From the first arrival to the last token."""
    num_requests: int
    num_finished: int
    num_refused: int
    """By the waiting queue, or because all KV blocks there are would not hold it."""
    refused: dict[str, int]
    """The same, by the reason of the error: keys of docs/errors.md."""
    num_cut: int
    """Requests drawn longer than the context and cut to it."""
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_ms: Percentiles
    inter_token_ms: Percentiles
    num_steps: int
    mean_rows: float
    """Of a step."""
    num_ignored_rows: int
    """Computed for sequences that had ended."""
    num_preemptions: int
    cached_share: float
    """Of the prompt tokens: found in the prefix cache."""
    limiting_stage: int
    """The busiest."""
    stages: tuple[StageResult, ...]
    real_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
