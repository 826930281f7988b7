"""What the scheduler is asked for, and what it says back."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


class Finish(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    """It sampled an end token."""
    LENGTH = "length"
    """max_tokens reached."""
    ABORT = "abort"
    """Somebody ended it."""
    DEADLINE = "deadline"
    """Its deadline passed first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1 is off."""
    seed: int = 0
    """Unsigned 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how to go on from it. Checked by whoever makes it: the scheduler trusts the values."""

    request_id: str
    prompt: npt.NDArray[np.uint32]
    """At least one token."""
    max_tokens: int
    """At least 1; prompt + max_tokens fits the context."""
    open_ended: bool = False
    """Nobody asked for `max_tokens`: it is what the context leaves, and is cut to what the lane holds."""
    sampling: Sampling = field(default_factory=Sampling)
    end_token_ids: frozenset[int] = frozenset()
    """Empty to ignore end tokens."""
    priority: int = 0
    """Higher goes first."""
    deadline: float = math.inf
    """When nobody waits for it any more: seconds on the clock that the scheduler's events are told."""
    arrived: float = 0.0
    """When it reached the router: seconds on the same clock."""
    trace: bytes = b""
    """Trace id and span id (24 bytes) that its spans are children of; empty where it is not sampled."""

    @property
    def num_positions(self) -> int:
        """KV cells it may need: the last token it samples is never computed."""
        return len(self.prompt) + self.max_tokens - 1


@dataclass(slots=True)
class Delta:
    """New tokens of a request, and its end if it ended."""

    request: Request
    token_ids: list[int]
    finish: Finish | None = None
