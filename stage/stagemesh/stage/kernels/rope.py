"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stagemesh.stage.kernels.pdl import pdl_options

HEADS_AT_ONCE = 8


@triton.jit
def _rope_append(
    qkv,
    positions,
    cells,
    table,
    keys,
    values,
    num_heads,
    num_kv_heads,
    head_dim,
    half,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pairs = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(table + position * head_dim + pairs, mask=pairs < half, other=0.0)[None, :]
    sin = tl.load(table + position * head_dim + half + pairs, mask=pairs < half, other=0.0)[None, :]
    inside = (heads < num_heads + num_kv_heads)[:, None] & (pairs < half)[None, :]
    row = qkv + token * (num_heads + 2 * num_kv_heads) * head_dim
    at = row + heads[:, None] * head_dim + pairs[None, :]
    # What the host sent was there before the product that this follows.
    cell = tl.load(cells + token).to(tl.int64) * num_kv_heads * head_dim
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty
    turned_left = (left * cos - right * sin).to(kind)
    turned_right = (right * cos + left * sin).to(kind)
    is_query = inside & (heads < num_heads)[:, None]
    tl.store(at, turned_left, mask=is_query)
    tl.store(at + half, turned_right, mask=is_query)
    is_key = inside & (heads >= num_heads)[:, None]
    into = cell + (heads - num_heads)[:, None] * head_dim + pairs[None, :]
    tl.store(keys + into, turned_left, mask=is_key)
    tl.store(keys + into + half, turned_right, mask=is_key)
    value = at + num_kv_heads * head_dim
    tl.store(values + into, tl.load(value, mask=is_key, other=0.0), mask=is_key)
    tl.store(values + into + half, tl.load(value + half, mask=is_key, other=0.0), mask=is_key)


def rope_append(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cells: torch.Tensor,
    table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    pdl: bool = False,
) -> None:
    """Rotate the queries of qkv in place; write rotated keys, and values, to the cells of their positions.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_dim], contiguous.
        positions: int32 [T].
        cells: int32 [T], cell of the cache for each position.
        table: float32 [max_context, head_dim]: cosines, then sines.
        keys: One layer's cache, [cells, kv_heads, head_dim], contiguous.
        values: The same.
        num_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        pdl: Start before the kernel ahead has ended, which must be one that itself waited for all before it.
    """
    head_dim = table.shape[1]
    half = head_dim // 2
    grid = (qkv.shape[0], triton.cdiv(num_heads + num_kv_heads, HEADS_AT_ONCE))
    _rope_append[grid](
        qkv,
        positions,
        cells,
        table,
        keys,
        values,
        num_heads,
        num_kv_heads,
        head_dim,
        half,
        BLOCK_HEADS=HEADS_AT_ONCE,
        BLOCK_HALF=triton.next_power_of_2(half),
        num_warps=2,
        **pdl_options(pdl),
    )
