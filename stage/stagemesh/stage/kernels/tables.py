"""Block tables on the device: they take changes, and give the flat block lists that paged attention reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128


# A variant for a count of 1 and another for multiples of 16 would compile while links are open (rule 9).
@triton.jit(do_not_specialize=["count"])
def _change(tables, slots, indexes, blocks, count, width, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < count, other=-1)
    index = tl.load(indexes + at, mask=at < count, other=0)
    block = tl.load(blocks + at, mask=at < count, other=0)
    tl.store(tables + slot.to(tl.int64) * width + index, block, mask=slot >= 0)


@triton.jit
def _flatten(tables, slots, begins, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    begin = tl.load(begins + row)
    count = tl.load(begins + row + 1) - begin
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        block = tl.load(tables + slot * width + at, mask=at < count, other=0)
        tl.store(out + begin + at, block, mask=at < count)


def change_tables(
    tables: torch.Tensor, slots: torch.Tensor, indexes: torch.Tensor, blocks: torch.Tensor
) -> None:
    """tables[slots[i], indexes[i]] = blocks[i]; int32 throughout, a slot below 0 is passed over."""
    count = slots.shape[0]
    _change[(triton.cdiv(count, BLOCK),)](
        tables, slots, indexes, blocks, count, tables.shape[1], BLOCK=BLOCK, num_warps=1
    )


def flatten_tables(
    tables: torch.Tensor, slots: torch.Tensor, begins: torch.Tensor, out: torch.Tensor
) -> None:
    """out[begins[r]:begins[r + 1]] = the first blocks of the table of slots[r], for each of the R rows."""
    _flatten[(slots.shape[0],)](tables, slots, begins, out, tables.shape[1], BLOCK=BLOCK, num_warps=1)
