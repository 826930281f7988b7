"""An engine whose costs and tokens are scripted: everything around it stays real. It needs no torch."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagemesh.model.cost import CostModel, StepShape
from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.engine.interface import HostEngine, RankFacts, StepInputs, StepOutput

WAKE_NS = 50_000
"""Before its end a step's sleep is over; the rest of the time is polled for."""
_PR_SET_TIMERSLACK = 29
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, slots=True)
class SimStep:
    """A step whose output is known and whose time has not come."""

    output: StepOutput
    ended_ns: int

    @property
    def done(self) -> bool:
        """Waited for where it was launched: a simulated stage has nothing else to do."""
        return True

    def wait(self) -> StepOutput:
        """Sleep until it has ended; the timer is early, for a processor that has slept takes its time."""
        while (left_ns := self.ended_ns - time.monotonic_ns()) > 0:
            if left_ns > WAKE_NS:
                time.sleep((left_ns - WAKE_NS) / 1e9)
        return self.output


def set_timer_slack(nanoseconds: int) -> None:
    """How late timers of this thread may be, on Linux; 50 us otherwise, more than a hop should take."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0)


class SimEngine(HostEngine):
    """Sleeps for each step's cost.

    A step ends at the later of its arrival and the previous step's end, plus its cost, whenever this process
    happens to wake up: so that a late wake-up delays what it touches once and is not added to every later step.

    Args:
        cost: Of a step.
        rank: Of this worker.
        hidden_bytes: Of one position's activations.
        num_blocks: KV blocks to claim to have.
        vocab_size: Tokens are below it.
        last: Whether the stage samples.
    """

    def __init__(
        self, cost: CostModel, *, rank: int, hidden_bytes: int, num_blocks: int, vocab_size: int, last: bool
    ) -> None:
        self._cost = cost
        self._rank = rank
        self._hidden_bytes = hidden_bytes
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._last = last
        self._ended_ns = 0
        set_timer_slack(1)

    def facts(self) -> RankFacts:
        return RankFacts(
            rank=self._rank,
            device="sim",
            num_heads=0,
            num_kv_heads=0,
            mlp_columns=0,
            weight_bytes=0,
            kv_bytes=0,
            num_blocks=self._num_blocks,
            process_id=os.getpid(),
        )

    def run(
        self,
        batch: Batch,
        *,
        arrived_ns: int,
        tokens: npt.NDArray[np.int64] | None,
        hidden: memoryview | None,
        debug_logits: bool,
    ) -> StepOutput:
        inputs = StepInputs(arrived_ns=arrived_ns, tokens=tokens, hidden=hidden, debug_logits=debug_logits)
        return self.launch(batch, inputs).wait()

    def launch(self, batch: Batch, inputs: StepInputs) -> SimStep:
        """Script the step's output at once; its handle sleeps, so that nothing is left to do at the end."""
        shape = StepShape(
            tokens=batch.num_tokens,
            rows=len(batch.slots),
            prefill=batch.num_tokens - len(batch.slots),
            context=int((batch.starts + batch.counts).sum()),
        )
        cost_ns = self._cost.nanoseconds(shape)
        self._ended_ns = max(inputs.arrived_ns, self._ended_ns) + cost_ns
        if not self._last:
            hidden = memoryview(bytes(batch.num_tokens * self._hidden_bytes))
            return SimStep(StepOutput(hidden=hidden, compute_ns=cost_ns), self._ended_ns)
        return SimStep(StepOutput(tokens=self._script(batch), compute_ns=cost_ns), self._ended_ns)

    def _script(self, batch: Batch) -> npt.NDArray[np.int64]:
        """A token from seed and position alone, like the real sampler's."""
        mixed = (batch.sampling.seeds + batch.sampling.positions.astype(np.uint64) * _GAMMA) * _MIX
        return ((mixed >> np.uint64(33)) % np.uint64(self._vocab_size)).astype(np.int64)
