"""A request on its way through the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.request import Finish, Request

TOKENS_KEPT = 64
"""Generated tokens of a running sequence that are kept in columns, before they are put away."""

Tokens = npt.NDArray[np.uint32]
Int64 = npt.NDArray[np.int64]


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
    chunks: list[tuple[Tokens, Int64]] = field(default_factory=list)
    """Generated tokens that were put away, and the steps that sampled them."""
    buffer: Callable[[], tuple[Tokens, Int64]] | None = None
    """The same of those still in the columns of its slot."""

    @property
    def waits_before(self) -> tuple[int, int]:
        """Sort key of the waiting queue: priority, then arrival."""
        return (-self.request.priority, self.order)

    @property
    def token_ids(self) -> Tokens:
        """Generated and seen by the router."""
        return np.concatenate([np.zeros(0, np.uint32), *(tokens for tokens, _ in self._parts())])

    @property
    def history(self) -> Tokens:
        """Its prompt and `token_ids`."""
        return np.concatenate([self.request.prompt, *(tokens for tokens, _ in self._parts())])

    @property
    def num_generated(self) -> int:
        """Of `token_ids`."""
        return sum(len(tokens) for tokens, _ in self._parts())

    @property
    def sampled_steps(self) -> Int64:
        """Numbers of the steps whose token has come back, for its trace: those that decoded it, and of those that computed
        its prompt the last."""
        return np.concatenate([np.zeros(0, np.int64), *(steps for _, steps in self._parts())])

    @property
    def last_step(self) -> int:
        """Number of the last step that computed it and is known to the router; 0 if none is."""
        sampled = next((int(steps[-1]) for _, steps in reversed(self._parts()) if len(steps)), 0)
        return max(sampled, *self.prefill_steps[-1:], 0)

    def _parts(self) -> list[tuple[Tokens, Int64]]:
        return [*self.chunks, self.buffer()] if self.buffer else self.chunks
