"""Paged attention with torch's scaled_dot_product_attention, for CPU stages.

Torch has no paged kernel for the CPU, so blocks are gathered into a dense [rows, length] cache for the
rows of a group. Two things keep that cheap: rows of like length share a group, so that little is
padding; and a sequence whose blocks lie one after the other (the router's allocator prefers that) is a
view and is not copied at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from stagemesh.stage.engine.batch import Batch

MAX_PADDING = 1.5
"""A decode group's longest context over its shortest, at most (in blocks)."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows that attend together, padded to the longest of them."""

    rows: torch.Tensor | slice
    """Flat positions, [B]; a slice where they are consecutive."""
    blocks: torch.Tensor
    """[B * width] block ids."""
    first_cell: int | None
    """Where the cache of a single row with consecutive blocks starts."""
    length: int
    """Cells of the padded context."""
    mask: torch.Tensor | None
    """Added to the scores, [B, 1, 1, length]; None if nothing is padding."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A row of several positions."""

    begin: int
    end: int
    start: int
    """Positions already in the cache."""
    blocks: torch.Tensor
    first_cell: int | None
    mask: torch.Tensor | None
    """Added to the scores, [count, start + count]; None where the row starts its sequence and plain causal masking does."""


class TorchPagedAttention:
    """The KV cache of one rank and its attention.

    Args:
        num_layers: Layers of this stage.
        num_blocks: KV blocks.
        block_size: Tokens of a block.
        num_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: Width of a head.
        dtype: Of the cache.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        # Uninitialized on purpose: pages that no sequence reached cost no memory.
        cells = (num_layers, 2, num_blocks * block_size, num_kv_heads, head_dim)
        self._cache = torch.empty(cells, dtype=dtype)
        # [layers, 2, blocks, ...]: numpy clears a few blocks ten times faster than torch's index_fill.
        self._block_bytes = self._cache.unflatten(2, (-1, block_size)).view(torch.uint8).numpy()
        self._block_size = block_size
        self._num_kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads
        self._head_dim = head_dim
        self._cells = torch.empty(0, dtype=torch.int64)
        self._decodes: list[_DecodeGroup] = []
        self._prefills: list[_Prefill] = []

    @property
    def num_bytes(self) -> int:
        """Of the cache."""
        return self._cache.nbytes

    def plan(self, batch: Batch) -> None:
        """Group the step's decode rows by length and prepare masks."""
        self._clear_entered_blocks(batch)
        self._cells = torch.from_numpy(batch.cells)
        self._prefills = [self._plan_prefill(batch, row) for row in np.flatnonzero(batch.counts > 1)]
        self._decodes = self._plan_decodes(batch, np.flatnonzero(batch.counts == 1))

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = self._cache[layer, 0], self._cache[layer, 1]
        keys.index_copy_(0, self._cells, key)
        values.index_copy_(0, self._cells, value)
        if len(self._decodes) == 1 and not self._prefills:
            return self._attend_decode(self._decodes[0], query, keys, values).view(query.shape[0], -1)
        out = torch.empty_like(query)
        for group in self._decodes:
            out[group.rows] = self._attend_decode(group, query[group.rows], keys, values)
        for row in self._prefills:
            part = slice(row.begin, row.end)
            if row.start == 0:
                context = (key[part], value[part])
            else:
                length = row.start + row.end - row.begin
                context = (
                    self._context(keys, row.blocks, row.first_cell, length),
                    self._context(values, row.blocks, row.first_cell, length),
                )
            out[part] = self._attend_prefill(row, query[part], *context)
        return out.view(out.shape[0], -1)

    def _clear_entered_blocks(self, batch: Batch) -> None:
        """Zero a block that a row enters and does not fill. A mask hides unwritten cells, but not a NaN in
        them: one that a former owner left must not reach this sequence.
        """
        ends = batch.starts + batch.counts
        last = (ends - 1) // self._block_size
        entered = np.flatnonzero((last * self._block_size >= batch.starts) & (ends % self._block_size > 0))
        if len(entered):
            self._block_bytes[:, :, batch.tables[entered, last[entered]]] = 0

    def _plan_decodes(self, batch: Batch, rows: np.ndarray) -> list[_DecodeGroup]:
        if not len(rows):
            return []
        lengths = batch.starts[rows] + 1
        widths = -(-lengths // self._block_size)
        order = np.argsort(widths, kind="stable")
        groups, begin = [], 0
        for end in range(1, len(order) + 1):
            if end == len(order) or widths[order[end]] > MAX_PADDING * widths[order[begin]] + 1:
                members = np.sort(order[begin:end])
                groups.append(
                    self._decode_group(batch, rows[members], lengths[members], int(widths[members].max()))
                )
                begin = end
        return groups

    def _decode_group(self, batch: Batch, rows: np.ndarray, lengths: np.ndarray, width: int) -> _DecodeGroup:
        flat = batch.offsets[rows]
        consecutive = bool((np.diff(flat) == 1).all())
        tables = batch.tables[rows, :width]
        # Padding past a row's own blocks would read whatever block the table names there, a NaN perhaps that
        # the mask does not hide: such entries repeat the row's first block.
        own = np.arange(width) * self._block_size < lengths[:, None]
        tables = np.where(own, tables, tables[:, :1])
        first_cell = self._first_cell(tables[0]) if len(rows) == 1 else None
        length = int(lengths.max()) if first_cell is not None else width * self._block_size
        mask = None
        if (lengths != length).any():
            own_cells = torch.from_numpy(np.arange(length) < lengths[:, None])
            # Of numbers, not bool: torch would turn a bool mask into one at every layer.
            mask = torch.zeros(own_cells.shape, dtype=self._cache.dtype).masked_fill_(~own_cells, -torch.inf)
            mask = mask.view(len(rows), 1, 1, length)
        return _DecodeGroup(
            rows=slice(int(flat[0]), int(flat[-1]) + 1) if consecutive else torch.from_numpy(flat),
            blocks=torch.from_numpy(tables.astype(np.int64).ravel()),
            first_cell=first_cell,
            length=length,
            mask=mask,
        )

    def _plan_prefill(self, batch: Batch, row: np.intp) -> _Prefill:
        start, count = int(batch.starts[row]), int(batch.counts[row])
        begin = int(batch.offsets[row])
        table = batch.tables[row, : -(-(start + count) // self._block_size)]
        mask = None
        if start:
            later = torch.ones(count, start + count, dtype=torch.bool).triu_(start + 1)
            mask = torch.zeros(later.shape, dtype=self._cache.dtype).masked_fill_(later, -torch.inf)
        return _Prefill(
            begin=begin,
            end=begin + count,
            start=start,
            blocks=torch.from_numpy(table.astype(np.int64)),
            first_cell=self._first_cell(table),
            mask=mask,
        )

    def _first_cell(self, table: np.ndarray) -> int | None:
        return int(table[0]) * self._block_size if bool((np.diff(table) == 1).all()) else None

    def _context(
        self, cells: torch.Tensor, blocks: torch.Tensor, first_cell: int | None, length: int
    ) -> torch.Tensor:
        """[length, kv_heads, head_dim] of one sequence; a view where its blocks are consecutive."""
        if first_cell is not None:
            return cells[first_cell : first_cell + length]
        return self._gather(cells, blocks)[:length]

    def _gather(self, cells: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        whole = cells.view(-1, self._block_size, self._num_kv_heads, self._head_dim)
        return whole.index_select(0, blocks).view(-1, self._num_kv_heads, self._head_dim)

    def _attend_decode(
        self, group: _DecodeGroup, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        rows = query.shape[0]
        # The heads of a KV group become query positions of one head, so that keys need no expansion.
        grouped = query.view(rows, self._num_kv_heads, self._group, self._head_dim)
        shape = (rows, group.length, self._num_kv_heads, self._head_dim)
        if group.first_cell is not None:
            part = slice(group.first_cell, group.first_cell + group.length)
            key, value = keys[part].view(shape), values[part].view(shape)
        else:
            key, value = (
                self._gather(keys, group.blocks).view(shape),
                self._gather(values, group.blocks).view(shape),
            )
        mask = (
            group.mask.expand(rows, self._num_kv_heads, self._group, -1) if group.mask is not None else None
        )
        out = F.scaled_dot_product_attention(
            grouped, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        return out.reshape(rows, -1, self._head_dim)

    def _attend_prefill(
        self, row: _Prefill, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=row.mask,
            is_causal=row.mask is None,
            enable_gqa=self._group > 1,
        )
        return out.squeeze(0).transpose(0, 1)
