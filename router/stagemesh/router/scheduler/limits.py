"""What a lane has room for, and how it is driven."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one lane, as long as it is open."""

    num_blocks: int
    block_size: int
    max_slots: int
    """Sequences running at once."""
    max_blocks: int
    """Of a sequence: the context in blocks."""
    max_waiting: int
    step_tokens: int
    """Positions of a step at most."""
    num_stages: int = 1
    num_microbatches: int
    """Parts the running decodes are dealt into (M), to begin with."""
    max_microbatches: int = 0
    """M at most; it follows from the cost of steps. 0: it stays num_microbatches."""
    depth: int
    """Unanswered steps at most (D)."""
    prefix_cache: bool = True
    """Share KV blocks of equal prefixes."""
    lookahead: int
    """Sampled tokens of a sequence that may be unseen when its next step is made."""
    itl_target_s: float = 0.0
    """Inter-token time within which 95% are to stay; prefill gives way for it. 0: no target."""
    consecutive_blocks: bool = True
    """Look for runs of blocks: an engine reads a sequence in place then. Of no use to block-table kernels."""
