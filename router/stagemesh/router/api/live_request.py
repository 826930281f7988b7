"""A request as the scheduler's side remembers it, and the columns of those that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stagemesh.router.scheduler import Finish, Request
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.wire.errors import StagemeshError

if TYPE_CHECKING:
    from stagemesh.router.api.requests import Port


@dataclass(slots=True, eq=False, kw_only=True)
class LiveRequest:
    """One request, also for a while after its end. Times are monotonic seconds, 0 where it has not happened."""

    request: Request
    port: Port
    """Of the public side that made it."""
    handle: int
    """By which that side knows it."""
    arrived: float
    admitted: float = 0.0
    """Its first step was sent."""
    first_token: float = 0.0
    ended: float = 0.0
    sequence: Sequence | None = None
    """The scheduler's; None if it was refused."""
    num_cached: int = 0
    """Prompt tokens found in the prefix cache."""
    finish: Finish | None = None
    error: StagemeshError | None = None


class SlotTable:
    """What the per-token path needs to know of the request in each slot, as columns."""

    def __init__(self) -> None:
        self.handles = np.zeros(0, np.uint32)
        self.ports = np.zeros(0, np.uint16)
        """Index of the port."""
        self.awaits_first = np.zeros(0, np.bool_)
        """No token of it has come yet."""

    def make_room(self, slot: int) -> None:
        """The columns have a place for that slot from here on."""
        length = len(self.handles)
        if slot < length:
            return
        more = max(64, slot + 1, 2 * length) - length
        self.handles = np.concatenate((self.handles, np.zeros(more, np.uint32)))
        self.ports = np.concatenate((self.ports, np.zeros(more, np.uint16)))
        self.awaits_first = np.concatenate((self.awaits_first, np.zeros(more, np.bool_)))
