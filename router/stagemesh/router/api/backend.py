"""What the public side and the scheduler's side say to each other.

The public side checks, tokenizes, detokenizes and streams (`Streams`); the scheduler's side owns the lane and
counts (`Requests`). They are in one process, or the public side is in API workers, and then each of these
calls is a message (`router/worker`). A handle is the number by which the public side that made a request knows
it; it is not used again while anything of it can be on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler import Finish, Request
from stagemesh.wire.errors import StagemeshError

Column = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class End:
    """A request ended well."""

    handle: int
    finish: Finish
    num_cached: int
    """Prompt tokens found in the prefix cache."""


class Backend(Protocol):
    """The scheduler's side, as one public side sees it."""

    def submit(self, handle: int, request: Request, arrived: float) -> None:
        """Start a request that came at `arrived` (monotonic seconds). A refusal comes as `Outlet.fail`."""

    def abandon(self, handle: int) -> None:
        """Nobody reads it any more; whatever still comes of it is for nobody."""

    def refused(self, code: str) -> None:
        """A request was refused, with that gRPC status code, before it came to `submit`."""

    async def abort(self, request_id: str) -> bool:
        """End a request, whoever made it, with finish reason ABORT; False if it is not live."""


class Outlet(Protocol):
    """One public side, as the scheduler's side sees it."""

    def take(self, handles: Column, token_ids: Column, ends: list[End]) -> None:
        """A step's new tokens, a row each, and the requests that ended with them."""

    def fail(self, handle: int, error: StagemeshError) -> None:
        """A request was refused, or ended with an error after the tokens that came before."""
