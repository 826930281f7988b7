"""Memory that what a step computes takes in turn. Pure arithmetic, for the accounting before anything exists.

In a layer queries, keys and values, the heads' output and the partial results of split contexts are done with when the
MLP begins; when the last layer is done, only logits are left. The three lie over each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.model.deal import RankDeal

ALIGN = 256
LOGIT_BYTES = 4
"""float32."""
MIN_MLP_ROWS = 2048
"""Positions that go through the MLP at once at least: fewer would read its weights too often."""
MLP_STEP = 128
"""Positions that go through at once are a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Where things lie in one piece of memory, in bytes."""

    attended: int
    """Offset of the heads' output, behind queries, keys and values, which begin at 0."""
    workspace: int
    """Offset of attention's partial results."""
    workspace_bytes: int
    mlp_rows: int
    """Positions whose gate and up projections find room at one time; they begin at 0."""
    total: int


def plan_scratch(
    rank: RankDeal,
    head_dim: int,
    *,
    step_tokens: int,
    sampled_rows: int,
    itemsize: int,
    workspace_bytes: int,
) -> Scratch:
    """Lay out a rank's memory.

    Args:
        rank: Its share.
        head_dim: Width of a head.
        step_tokens: Positions of a step at most.
        sampled_rows: Rows whose logits exist at one time; 0 on a stage that does not sample.
        itemsize: Bytes of an activation.
        workspace_bytes: Of attention's partial results.
    """
    queries, keys = len(rank.heads) * head_dim, len(rank.kv_heads) * head_dim
    attended = _aligned(step_tokens * (queries + 2 * keys) * itemsize)
    workspace = attended + _aligned(step_tokens * queries * itemsize)
    row = 2 * len(rank.columns) * itemsize
    total = max(
        workspace + _aligned(workspace_bytes),
        _aligned(min(step_tokens, MIN_MLP_ROWS) * row),
        _aligned(sampled_rows * len(rank.vocab) * LOGIT_BYTES),
    )
    rows = total // row
    return Scratch(
        attended=attended,
        workspace=workspace,
        workspace_bytes=workspace_bytes,
        mlp_rows=step_tokens if rows >= step_tokens else rows // MLP_STEP * MLP_STEP,
        total=total,
    )


def mlp_slices(num_tokens: int, mlp_rows: int) -> list[slice]:
    """Positions that go through the MLP together: even parts of at most mlp_rows."""
    if num_tokens <= mlp_rows:
        return [slice(0, num_tokens)]
    parts = -(-num_tokens // mlp_rows)
    size = min(mlp_rows, -(-num_tokens // (parts * MLP_STEP)) * MLP_STEP)
    return [slice(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
