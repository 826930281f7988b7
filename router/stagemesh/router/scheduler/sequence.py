"""A request on its way through the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.request import Finish, Request

TOKENS_KEPT = 256
"""Generated tokens of a running sequence that are kept in columns, before they are put away."""

TOKEN_BITS = 32
"""Of an entry of `Sampled` that the token takes; the step has the others."""

Tokens = npt.NDArray[np.uint32]
Int64 = npt.NDArray[np.int64]
Sampled = npt.NDArray[np.uint64]
"""[tokens] each with the number of the step that sampled it, in one number, so that a token costs one write."""


NOTHING: Sampled = np.zeros(0, np.uint64)


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler remembers of a request beside the columns of its slot."""

    request: Request
    order: int
    """Of arrival; kept through preemption."""
    slot: int = -1
    """-1 while it waits."""
    first_position: int = 0
    """Where computing starts after admission: above 0 after a prefix-cache hit."""
    keys: list[bytes] = field(default_factory=list)
    """Of its leading blocks that are published or shared; while it waits, of those that were looked for."""
    num_cached: int = 0
    """Prompt tokens it did not have to compute when it was first admitted."""
    claim: int = -1
    """First block of the run it claimed; -1 if it has none."""
    to_prefill: Tokens = field(default_factory=lambda: np.zeros(0, np.uint32))
    """Tokens to compute before it decodes: the prompt, and after a preemption what was generated."""
    finish: Finish | None = None
    num_preemptions: int = 0
    prefill_steps: list[int] = field(default_factory=list)
    """Numbers of the steps that computed chunks of it, for its trace."""
    chunks: list[Sampled] = field(default_factory=list)
    """Generated tokens that were put away."""
    buffer: Callable[[], Sampled] | None = None
    """The same of those still in the columns of its slot."""

    @property
    def waits_before(self) -> tuple[int, int]:
        """Sort key of the waiting queue: priority, then arrival."""
        return (-self.request.priority, self.order)

    @property
    def token_ids(self) -> Tokens:
        """Generated and seen by the router."""
        return self._sampled().astype(np.uint32)

    @property
    def history(self) -> Tokens:
        """Its prompt and `token_ids`."""
        return np.concatenate([self.request.prompt, self.token_ids])

    @property
    def num_generated(self) -> int:
        """Of `token_ids`."""
        return sum(len(part) for part in self._parts())

    @property
    def sampled_steps(self) -> Int64:
        """Numbers of the steps whose token has come back, for its trace: those that decoded it, and of those that computed
        its prompt the last."""
        return (self._sampled() >> TOKEN_BITS).astype(np.int64)

    @property
    def last_step(self) -> int:
        """Number of the last step that computed it and is known to the router; 0 if none is."""
        sampled = next((int(part[-1]) >> TOKEN_BITS for part in reversed(self._parts()) if len(part)), 0)
        return max(sampled, *self.prefill_steps[-1:], 0)

    def _sampled(self) -> Sampled:
        return np.concatenate([NOTHING, *self._parts()])

    def _parts(self) -> list[Sampled]:
        return [*self.chunks, self.buffer()] if self.buffer else self.chunks
