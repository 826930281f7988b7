"""Paged attention with torch's operators, for CPU stages.

Torch has no paged kernel for the CPU, so blocks are gathered into dense keys and values of the rows of a
group. What keeps that cheap: rows of like length share a group, so that little is padding; keys and values
of a group are gathered at once, into memory that is used again at every layer and still in the cache when
it is multiplied; and a lone row whose blocks lie one after the other (the router's allocator prefers that)
is a view and is not copied at all.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from stagemesh.stage.engine.batch import Batch

MAX_PADDING = 1.5
"""A decode group's longest context over its shortest, at most (in blocks)."""
QUERIES = 256
"""Of a chunk that attend together: the operator computes what a mask hides as well, and fewer see less of it."""
GATHERED_BYTES = 8 << 20
"""Keys and values that a group of several rows gathers, at most: more would not stay in the CPU's cache."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows that attend together, padded to the longest of them."""

    rows: torch.Tensor | slice
    """Flat positions, [B]; a slice where they are consecutive."""
    num_rows: int
    """B."""
    pieces: torch.Tensor
    """Where the blocks of each row are, for the keys of each head, then the values: [2 * kv_heads * B * width]."""
    first_cell: int | None
    """Where the cache of a single row with consecutive blocks starts."""
    length: int
    """Cells of the padded context."""
    mask: torch.Tensor
    """Added to the scores, [kv_heads * B, group, length]; one zero if nothing is padding."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A row of several positions."""

    begin: int
    end: int
    start: int
    """Positions already in the cache."""
    pieces: torch.Tensor
    """As of a decode group."""
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
        # Head by head, so that the cells of a head are a matrix.
        self._cache = _untouched((num_layers, 2, num_kv_heads, num_blocks * block_size, head_dim), dtype)
        # [layers, 2, kv_heads, blocks, ...]: numpy clears a few blocks ten times faster than index_fill.
        self._block_bytes = self._cache.unflatten(3, (-1, block_size)).view(torch.uint8).numpy()
        # Views made once: making one costs as much as a small product.
        self._keys = list(self._cache[:, 0])
        self._values = list(self._cache[:, 1])
        # A block of one head's keys, or values, is a piece; a flat list of them is gathered twice as fast.
        self._pieces = list(self._cache.view(num_layers, -1, block_size * head_dim))
        self._heads_begin = np.arange(2 * num_kv_heads)[:, None] * num_blocks
        self._gathered = torch.empty(0, 0, dtype=dtype)
        self._no_mask = torch.zeros(1, 1, 1, dtype=dtype)
        self._block_size = block_size
        self._num_kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5
        self._cells = torch.empty(0, dtype=torch.int64)
        self._decodes: list[_DecodeGroup] = []
        self._prefills: list[_Prefill] = []
        self.batch: Batch
        self._is_grouped = False

    @property
    def num_bytes(self) -> int:
        """Of the cache."""
        return self._cache.nbytes

    @property
    def cache(self) -> torch.Tensor:
        """[layers, 2 (keys, values), kv_heads, cells, head_dim]"""
        return self._cache

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._block_size

    def plan(self, batch: Batch) -> None:
        self._clear_entered_blocks(batch)
        self.batch = batch
        self._is_grouped = False

    def _group_rows(self, batch: Batch) -> None:
        """Group the step's decode rows by length and prepare masks; not needed where compiled kernels attend."""
        self._cells = torch.from_numpy(batch.cells)
        self._prefills = [self._plan_prefill(batch, row) for row in np.flatnonzero(batch.counts > 1)]
        self._decodes = self._plan_decodes(batch, np.flatnonzero(batch.counts == 1))
        self._is_grouped = True

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not self._is_grouped:
            self._group_rows(self.batch)
        self._keys[layer].index_copy_(1, self._cells, key.transpose(0, 1))
        self._values[layer].index_copy_(1, self._cells, value.transpose(0, 1))
        if len(self._decodes) == 1 and not self._prefills:
            return self._attend_decode(layer, self._decodes[0], query)
        out = query.new_empty(query.shape[0], query.shape[1] * self._head_dim)
        for group in self._decodes:
            out[group.rows] = self._attend_decode(layer, group, query[group.rows])
        for row in self._prefills:
            part = slice(row.begin, row.end)
            if row.start == 0:
                context = (key[part].transpose(0, 1), value[part].transpose(0, 1))
            else:
                length = row.start + row.end - row.begin
                context = self._context(layer, row.pieces, row.first_cell, length)
            out[part] = self._attend_prefill(row, query[part], *context)
        return out

    def _clear_entered_blocks(self, batch: Batch) -> None:
        """Zero a block that a row enters and does not fill. A mask hides unwritten cells, but not a NaN in
        them: one that a former owner left must not reach this sequence.
        """
        ends = batch.starts + batch.counts
        last = (ends - 1) // self._block_size
        entered = np.flatnonzero((last * self._block_size >= batch.starts) & (ends % self._block_size > 0))
        if len(entered):
            self._block_bytes[:, :, :, batch.tables[entered, last[entered]]] = 0

    def _plan_decodes(self, batch: Batch, rows: np.ndarray) -> list[_DecodeGroup]:
        if not len(rows):
            return []
        lengths = batch.starts[rows] + 1
        widths = -(-lengths // self._block_size)
        order = np.argsort(widths, kind="stable")
        groups, begin = [], 0
        for end in range(1, len(order) + 1):
            if end == len(order) or not self._fits(widths[order[begin]], widths[order[end]], end - begin + 1):
                members = np.sort(order[begin:end])
                groups.append(
                    self._decode_group(batch, rows[members], lengths[members], int(widths[members].max()))
                )
                begin = end
        return groups

    def _fits(self, narrowest: int, widest: int, num_rows: int) -> bool:
        """Whether that many rows, padded to the widest, may be one group."""
        block_bytes = 2 * self._num_kv_heads * self._block_size * self._head_dim * self._cache.itemsize
        return widest <= MAX_PADDING * narrowest + 1 and num_rows * widest * block_bytes <= GATHERED_BYTES

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
        mask = self._no_mask
        if (lengths != length).any():
            padding = torch.from_numpy(np.arange(length) >= lengths[:, None])
            mask = torch.zeros(padding.shape, dtype=self._cache.dtype).masked_fill_(padding, -torch.inf)
            mask = mask.unsqueeze(1).expand(self._num_kv_heads, -1, self._group, -1).flatten(0, 1)
        return _DecodeGroup(
            rows=slice(int(flat[0]), int(flat[-1]) + 1) if consecutive else torch.from_numpy(flat),
            num_rows=len(rows),
            pieces=self._pieces_of(tables),
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
            pieces=self._pieces_of(table),
            first_cell=self._first_cell(table),
            mask=mask,
        )

    def _first_cell(self, table: np.ndarray) -> int | None:
        return int(table[0]) * self._block_size if bool((np.diff(table) == 1).all()) else None

    def _context(
        self, layer: int, pieces: torch.Tensor, first_cell: int | None, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence, [kv_heads, length, head_dim]; views where its blocks are consecutive."""
        if first_cell is not None:
            part = slice(first_cell, first_cell + length)
            return self._keys[layer][:, part], self._values[layer][:, part]
        keys, values = self._gather(layer, pieces)
        return keys[:, :length], values[:, :length]

    def _pieces_of(self, blocks: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((self._heads_begin + blocks.ravel()).ravel())

    def _gather(self, layer: int, pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [kv_heads, blocks * block_size, head_dim] each, valid until the next call."""
        width = self._block_size * self._head_dim
        if len(self._gathered) < len(pieces):
            self._gathered = self._cache.new_empty(len(pieces) * 5 // 4, width)
        out = self._gathered[: len(pieces)]
        torch.index_select(self._pieces[layer], 0, pieces, out=out)
        keys, values = out.view(2, self._num_kv_heads, -1, self._head_dim).unbind()
        return keys, values

    def _attend_decode(self, layer: int, group: _DecodeGroup, query: torch.Tensor) -> torch.Tensor:
        """[B, heads, head_dim] to [B, heads * head_dim]. The heads of a KV group are the rows of one product."""
        keys, values = self._context(layer, group.pieces, group.first_cell, group.num_rows * group.length)
        # A product for each KV head and row: [kv_heads * B, group or length, head_dim].
        batch = self._num_kv_heads * group.num_rows
        heads = (group.num_rows, self._num_kv_heads, self._group, self._head_dim)
        grouped = query.reshape(heads).transpose(0, 1).reshape(batch, self._group, self._head_dim)
        keys = keys.reshape(batch, group.length, self._head_dim)
        values = values.reshape(batch, group.length, self._head_dim)
        if query.dtype == torch.float32:  # a third faster than torch's fused operator, for so few queries
            scores = torch.baddbmm(group.mask, grouped, keys.transpose(1, 2), alpha=self._scale)
            out = torch.bmm(scores.softmax(-1), values)
        else:  # which keeps scores in float32
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
        return out.view(self._num_kv_heads, group.num_rows, -1).transpose(0, 1).reshape(group.num_rows, -1)

    def _attend_prefill(
        self, row: _Prefill, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """[n, heads, head_dim] after keys and values [kv_heads, m, head_dim], to [n, heads * head_dim]."""
        if row.mask is None:
            return self._attend_dense(query, key, value, None)
        parts = []
        for begin in range(0, len(query), QUERIES):
            end = min(begin + QUERIES, len(query))
            seen = row.start + end
            mask = row.mask[begin:end, :seen]
            parts.append(self._attend_dense(query[begin:end], key[:, :seen], value[:, :seen], mask))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_dense(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self._group > 1,
        )
        return out.squeeze(0).transpose(0, 1).flatten(1)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of which only the pages that a sequence reached cost anything. Small pages: with huge ones, which
    torch asks for, the first token of all costs 2 MiB for each head of each layer.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
