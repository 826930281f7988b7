"""What the router remembers of a sampled request until it ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """A sampled request."""

    trace_id: bytes
    span_id: bytes
    """Of the router's span, which everything in the mesh is a child of."""
    parent_id: bytes
    """Of the client's span; zeros where the trace begins here."""
    began_ns: int
    """Monotonic."""
    operation: str
    prompt: str = ""
    """JSON of the messages, if prompts may go into spans."""

    @property
    def context(self) -> bytes:
        """Trace id and span id, 24 bytes: what a Request carries."""
        return self.trace_id + self.span_id
