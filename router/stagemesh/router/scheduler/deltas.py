"""What an event of the scheduler means for requests, as columns: one object a step, not one a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.request import Delta, Finish
from stagemesh.router.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDeltas:
    """New tokens, a row for each request that gained one, and requests that ended.

    A consumer that serves many streams reads the columns; iterating makes a `Delta` for each row.
    """

    sequences: npt.NDArray[np.object_] = field(default_factory=lambda: np.empty(0, np.object_))
    """[rows] `Sequence`s, none twice."""
    slots: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[rows] the slot of each: small numbers to index a table of receivers with. A sequence has its slot
    from `on_admitted` on, and may get another one when it is admitted again after a preemption."""
    token_ids: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    """[rows] the new token of each."""
    ends: tuple[tuple[Sequence, Finish], ...] = ()
    """Who ended; in a step's deltas each of them is also among the rows, with its last token."""

    def __len__(self) -> int:
        """Rows, and ends without a row."""
        return len(self.sequences) or len(self.ends)

    def __iter__(self) -> Iterator[Delta]:
        finishes = {id(sequence): finish for sequence, finish in self.ends}
        if not len(self.sequences):
            yield from (Delta(sequence.request, [], finish) for sequence, finish in self.ends)
        for sequence, token in zip(self.sequences.tolist(), self.token_ids.tolist(), strict=True):
            yield Delta(sequence.request, [token], finishes.get(id(sequence)))
