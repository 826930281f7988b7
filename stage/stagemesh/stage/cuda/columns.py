"""What the host tells the device about a step: int32 columns side by side in one buffer, one copy a step.

A layout is made for the sizes of a graph's bucket, or for those of the step where no graph runs it. What a
step does not fill is padding that computes harmlessly: tokens 0 at position 0 that write to a scratch cell,
samples of row 0 that go to a scratch slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagemesh.stage.engine.batch import Batch

Int32 = npt.NDArray[np.int32]

ALIGN = 4
"""Columns begin at multiples of 16 bytes: vectorized loads, and seeds are int64."""


@dataclass(frozen=True)
class Layout:
    """Where each column lies, for at most so many of each."""

    tokens: int
    rows: int
    samples: int
    changes: int

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Slices of the buffer by name."""
        lengths = {
            "tokens": self.tokens,
            "positions": self.tokens,
            "cells": self.tokens,
            "token_slots": self.tokens,
            "row_slots": self.rows,
            "kv_begins": self.rows + 1,
            "last_page": self.rows,
            "prefill_begins": self.rows + 1,
            "sampled_rows": self.samples,
            "sampled_slots": self.samples,
            "seeds": 2 * self.samples,
            "sampled_positions": self.samples,
            "temperatures": self.samples,
            "filtered": self.samples,
            "top_ks": self.samples,
            "top_ps": self.samples,
            "change_slots": self.changes,
            "change_indexes": self.changes,
            "change_blocks": self.changes,
        }
        columns, at = {}, 0
        for name, length in lengths.items():
            columns[name] = slice(at, at + length)
            at += -(-length // ALIGN) * ALIGN
        return columns

    @property
    def size(self) -> int:
        """int32 numbers in all."""
        return int(self.columns["change_blocks"].stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """What the attention of a step's rows is planned from, on the host; int32."""

    num_decodes: int
    """Rows of one position that come before all others."""
    kv_begins: Int32
    """[R + 1] where each row's blocks begin among all rows' blocks."""
    prefill_begins: Int32
    """[R - num_decodes + 1] where each further row begins among their positions."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.kv_begins) - 1


def plan_rows(batch: Batch, block_size: int) -> RowPlan:
    """Rows as attention sees them: single positions first, the rest as prefill, whatever they are."""
    wide = np.flatnonzero(batch.counts > 1)
    num_decodes = int(wide[0]) if len(wide) else len(batch.counts)
    blocks = -(-(batch.starts + batch.counts) // block_size)
    kv_begins = np.zeros(len(blocks) + 1, np.int32)
    np.cumsum(blocks, out=kv_begins[1:])
    prefill_begins = np.zeros(len(blocks) - num_decodes + 1, np.int32)
    np.cumsum(batch.counts[num_decodes:], out=prefill_begins[1:])
    return RowPlan(
        num_decodes=num_decodes,
        kv_begins=kv_begins,
        prefill_begins=prefill_begins,
    )


def filtered_rows(batch: Batch) -> npt.NDArray[np.int64]:
    """Sampled rows, of S, that ask for top-k or top-p."""
    sampling = batch.sampling
    return np.flatnonzero((sampling.temperatures > 0) & ((sampling.top_ks > 0) | (sampling.top_ps < 1)))


def fill(
    buffer: Int32,
    layout: Layout,
    batch: Batch,
    rows: RowPlan,
    tokens: npt.NDArray[np.int64] | None,
    *,
    block_size: int,
    scratch_cell: int,
    scratch_slot: int,
) -> None:
    """Write a step's columns.

    Args:
        buffer: At least layout.size long.
        layout: At least as large as the step in everything.
        batch: The step.
        rows: Of the batch.
        tokens: [T] input ids, on the first stage; else the tokens column is left as it is.
        block_size: Tokens of a block.
        scratch_cell: Where padding writes its keys and values.
        scratch_slot: Where padding writes its samples.
    """
    columns = layout.columns

    def put(name: str, values: npt.NDArray[np.integer] | npt.NDArray[np.floating], padding: int) -> None:
        column = buffer[columns[name]]
        column[: len(values)] = values
        column[len(values) :] = padding

    if tokens is not None:
        put("tokens", tokens, 0)
    put("positions", batch.positions, 0)
    put("cells", batch.cells, scratch_cell)
    put("token_slots", np.repeat(batch.slots, batch.counts), scratch_slot)
    put("row_slots", batch.slots, scratch_slot)
    put("kv_begins", rows.kv_begins, int(rows.kv_begins[-1]))
    ends = batch.starts + batch.counts
    put("last_page", (ends - 1) % block_size + 1, 1)
    put("prefill_begins", rows.prefill_begins, int(rows.prefill_begins[-1]))
    if layout.samples:
        put("sampled_rows", batch.sampled_rows, 0)
        put("sampled_slots", batch.sampled_slots, scratch_slot)
        sampling = batch.sampling
        put("seeds", sampling.seeds.view(np.int32), 0)
        put("sampled_positions", sampling.positions, 0)
        put("temperatures", sampling.temperatures.view(np.int32), 0)
        filtered = filtered_rows(batch)
        put("filtered", filtered, 0)
        put("top_ks", sampling.top_ks[filtered], 0)
        put("top_ps", sampling.top_ps[filtered].view(np.int32), 0)
    changes = batch.changes
    put("change_slots", changes.slots, -1)
    put("change_indexes", changes.indexes, 0)
    put("change_blocks", changes.blocks, 0)
