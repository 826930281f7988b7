"""How much scratch memory FlashInfer's kernels need. Pure arithmetic, for the accounting before anything exists."""

from __future__ import annotations

DECODE_TILE = 16
PREFILL_TILE = 128
MAX_SPLIT_CTAS = 2 * 160
"""Two for each multiprocessor, of a device larger than those there are."""


def workspace_bytes(num_heads: int, num_kv_heads: int, head_dim: int, max_rows: int) -> int:
    """Bytes of partial results where contexts are split: decode graphs of max_rows rows, or any prefill."""
    group = num_heads // num_kv_heads
    splits = MAX_SPLIT_CTAS // num_kv_heads + 1
    tiles = max(-(-max_rows * group // DECODE_TILE) + max_rows, splits)
    most = max(tiles * DECODE_TILE, splits * PREFILL_TILE)
    return num_heads * most * (head_dim + 1) * 4 + (1 << 16)
