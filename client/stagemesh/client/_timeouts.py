"""A call's timeout: its own, or its client's."""

from __future__ import annotations

import math
from enum import Enum
from numbers import Real

from stagemesh.wire.errors import InvalidArgumentError

LONGEST_S = 365 * 24 * 3600.0
"""A longer timeout, infinity too, is for ever: the clocks of gRPC and of the system end somewhere above it."""


class ClientDefault(Enum):
    """Stands for "as the client was told", since None means "for ever"."""

    CLIENT_DEFAULT = "the client's timeout"

    def __repr__(self) -> str:
        return "CLIENT_DEFAULT"


CLIENT_DEFAULT = ClientDefault.CLIENT_DEFAULT


def call_timeout_s(timeout: float | ClientDefault | None, client_timeout_s: float | None) -> float | None:
    """Seconds the call may take; None is for ever. InvalidArgumentError if it is no number of seconds."""
    seconds = client_timeout_s if isinstance(timeout, ClientDefault) else timeout
    if seconds is None:
        return None
    if not isinstance(seconds, Real) or math.isnan(seconds):
        raise InvalidArgumentError(
            f"timeout: {seconds!r:.80} does not fit: expected seconds, or None for ever",
            reason="INVALID_VALUE",
            field="timeout",
        )
    return None if seconds > LONGEST_S else seconds
