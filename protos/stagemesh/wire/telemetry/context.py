"""W3C trace context: who a span belongs to, across processes."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Self

TRACEPARENT_KEY = "traceparent"
"""Metadata of a call."""
_FORMAT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE, _NO_SPAN = bytes(16), bytes(8)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span that others may be children of."""

    trace_id: bytes
    """16 bytes, not all 0."""
    span_id: bytes
    """8 bytes, not all 0."""
    sampled: bool

    @classmethod
    def parse(cls, traceparent: str) -> Self | None:
        """The context of a header; None where it is empty or malformed, as the standard has it: start anew."""
        match = _FORMAT.fullmatch(traceparent.strip())
        if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
            return None
        trace_id, span_id = bytes.fromhex(match[2]), bytes.fromhex(match[3])
        if trace_id == _NO_TRACE or span_id == _NO_SPAN:
            return None
        return cls(trace_id, span_id, bool(int(match[4], 16) & 1))

    @property
    def header(self) -> str:
        """As a traceparent."""
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{'01' if self.sampled else '00'}"


def new_trace_id() -> bytes:
    """16 random bytes."""
    return random.randbytes(16)


def new_span_id() -> bytes:
    """8 random bytes."""
    return random.randbytes(8)
