"""A request on its way through the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.request import Finish, Request


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
    """Of its leading blocks that are published or shared."""
    num_cached: int = 0
    """Prompt tokens it did not have to compute when it was first admitted."""
    token_ids: list[int] = field(default_factory=list)
    """Generated and seen by the router."""
    claim: int = -1
    """First block of the run it claimed; -1 if it has none."""
    to_prefill: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    """Tokens to compute before it decodes: the prompt, and after a preemption what was generated."""
    finish: Finish | None = None
    num_preemptions: int = 0
    prefill_steps: list[int] = field(default_factory=list)
    decode_steps: list[int] = field(default_factory=list)
    """Numbers of the steps that computed it, for its trace."""

    @property
    def waits_before(self) -> tuple[int, int]:
        """Sort key of the waiting queue: priority, then arrival."""
        return (-self.request.priority, self.order)
