"""Batches made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagemesh.stage.engine.batch import Batch, SamplingColumns


def columns(
    count: int,
    *,
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
) -> SamplingColumns:
    """Sampling parameters of `count` rows; one value stands for all."""
    return SamplingColumns(
        seeds=np.array(seeds if seeds is not None else range(count), np.uint64),
        positions=np.array(positions if positions is not None else [0] * count, np.int64),
        temperatures=np.broadcast_to(np.float32(temperature), count).copy(),
        top_ks=np.broadcast_to(np.int32(top_k), count).copy(),
        top_ps=np.broadcast_to(np.float32(top_p), count).copy(),
    )


def batch(rows: Sequence[tuple[int, int, Sequence[int]]], block_size: int) -> Batch:
    """Rows of (first position, positions, block table)."""
    starts = np.array([start for start, _, _ in rows], np.int64)
    counts = np.array([count for _, count, _ in rows], np.int64)
    tables = np.zeros((len(rows), max(len(table) for _, _, table in rows)), np.int32)
    for row, (_, _, table) in enumerate(rows):
        tables[row, : len(table)] = table
    positions = np.concatenate([np.arange(start, start + count) for start, count, _ in rows])
    row_of = np.repeat(np.arange(len(rows)), counts)
    cells = tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    offsets = np.cumsum(counts) - counts
    slots = np.arange(len(rows))
    return Batch(
        number=1,
        slots=slots,
        counts=counts,
        starts=starts,
        offsets=offsets,
        positions=positions,
        cells=cells,
        tables=tables,
        input_steps=np.zeros(len(rows), np.uint64),
        given_tokens=np.zeros(len(positions), np.int64),
        sampled_slots=slots,
        sampled_rows=offsets + counts - 1,
        sampling=columns(len(rows)),
    )
