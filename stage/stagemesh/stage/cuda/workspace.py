"""How much scratch memory FlashInfer's kernels need. Pure arithmetic, for the accounting before anything exists."""

from __future__ import annotations

DECODE_TILE = 16
PREFILL_TILE = 128
CTAS_PER_SM = 2
MAX_SMS = 160
"""Of a device larger than those there are."""


def most_splits(num_kv_heads: int, num_sms: int) -> int:
    """Pieces that contexts are cut into at most, those of all rows together."""
    return CTAS_PER_SM * num_sms // num_kv_heads


def workspace_bytes(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of partial results where contexts are split, whatever the step.

    Decode graphs of more rows than there may be pieces have none.
    """
    group = num_heads // num_kv_heads
    splits = most_splits(num_kv_heads, MAX_SMS) + 1
    tiles = -(-splits * group // DECODE_TILE) + splits
    most = max(tiles * DECODE_TILE, splits * PREFILL_TILE)
    return num_heads * most * (head_dim + 1) * 4 + (1 << 16)
