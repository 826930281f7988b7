"""The contract of an engine: what computes the steps of one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stagemesh.stage.engine.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What a rank holds, for Describe and the load line; plain values that cross the local queue as JSON."""

    rank: int
    device: str
    num_heads: int
    num_kv_heads: int
    mlp_columns: int
    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    process_id: int
    load_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a step left behind; host memory that nobody writes again."""

    hidden: memoryview | None = None
    """Bytes of [T, hidden_size] in the stage's dtype, for the next stage; None on the last."""
    tokens: npt.NDArray[np.int64] | None = None
    """[S] sampled token ids, on the last stage."""
    logits: npt.NDArray[np.float32] | None = None
    """[S, vocab_size] if the lane asks for them (debug)."""


class Engine(Protocol):
    """Computes steps in order. It holds weights and KV; the slots are the worker's."""

    def facts(self) -> RankFacts:
        """What this rank holds."""

    def run(
        self,
        batch: Batch,
        *,
        arrived_ns: int,
        tokens: npt.NDArray[np.int64] | None,
        hidden: memoryview | None,
        debug_logits: bool,
    ) -> StepOutput:
        """Compute one step.

        Args:
            batch: The step's rows.
            arrived_ns: Monotonic time at which all the step needs had come.
            tokens: int64 [T] input ids, on the first stage.
            hidden: Bytes of [T, hidden_size] from the stage before, elsewhere.
            debug_logits: Return the logits of the sampled rows too.
        """
