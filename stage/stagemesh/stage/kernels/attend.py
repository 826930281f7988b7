"""Paged attention without FlashInfer: any type, any mix of rows, one program for a position and a KV head.

It reads a context once for every position, so it is no match for FlashInfer in prefill. It is there where
FlashInfer is not, and for float32, which FlashInfer does not compute.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CELLS_AT_ONCE = 16


@triton.jit
def _attend(
    qkv,
    keys,
    values,
    tables,
    slots,
    positions,
    out,
    scale,
    row_width,
    num_heads,
    num_kv_heads,
    head_dim,
    group,
    table_width,
    block_size,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    CELLS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    length = tl.load(positions + token) + 1
    members = tl.arange(0, GROUP)
    dims = tl.arange(0, DIM)
    heads = kv_head * group + members
    inside = (members < group)[:, None] & (dims < head_dim)[None, :]
    query = tl.load(
        qkv + token * row_width + heads[:, None] * head_dim + dims[None, :], mask=inside, other=0.0
    )
    query = query.to(tl.float32) * scale
    total = tl.zeros([GROUP, DIM], tl.float32)
    weight = tl.zeros([GROUP], tl.float32)
    highest = tl.full([GROUP], float("-inf"), tl.float32)
    for first in range(0, length, CELLS):
        at = first + tl.arange(0, CELLS)
        seen = at < length
        block = tl.load(tables + slot * table_width + at // block_size, mask=seen, other=0).to(tl.int64)
        cell = (block * block_size + at % block_size) * num_kv_heads + kv_head
        read = seen[:, None] & (dims < head_dim)[None, :]
        key = tl.load(keys + cell[:, None] * head_dim + dims[None, :], mask=read, other=0.0).to(tl.float32)
        value = tl.load(values + cell[:, None] * head_dim + dims[None, :], mask=read, other=0.0).to(
            tl.float32
        )
        score = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))
        shrink = tl.exp(highest - higher)
        share = tl.exp(score - higher[:, None])
        weight = weight * shrink + tl.sum(share, axis=1)
        total = total * shrink[:, None] + tl.sum(share[:, :, None] * value[None, :, :], axis=1)
        highest = higher
    total = total / weight[:, None]
    into = out + token * num_heads * head_dim + heads[:, None] * head_dim + dims[None, :]
    tl.store(into, total.to(out.dtype.element_ty), mask=inside)


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
) -> None:
    """Causal attention of every position to its sequence, whose keys and values are in the cache, its own too.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_dim], rotated; only the queries are read.
        keys: One layer's cache, [cells, kv_heads, head_dim].
        values: The same.
        tables: int32 [slots, blocks].
        slots: int32 [T], slot of each position.
        positions: int32 [T].
        out: [T, heads * head_dim].
        num_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        block_size: Cells of a block.
    """
    head_dim = keys.shape[-1]
    group = num_heads // num_kv_heads
    _attend[(qkv.shape[0], num_kv_heads)](
        qkv,
        keys,
        values,
        tables,
        slots,
        positions,
        out,
        head_dim**-0.5,
        qkv.shape[1],
        num_heads,
        num_kv_heads,
        head_dim,
        group,
        tables.shape[1],
        block_size,
        GROUP=triton.next_power_of_2(group),
        DIM=triton.next_power_of_2(head_dim),
        CELLS=CELLS_AT_ONCE,
        num_warps=4,
    )
