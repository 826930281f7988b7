"""Paged attention on the CPU against attention written out, over caches full of NaN elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from batches_for_tests import batch

from stagemesh.stage.attention import TorchPagedAttention

BLOCK, BLOCKS, HEADS, KV_HEADS, DIM = 4, 40, 6, 3, 8

Row = tuple[int, int, list[int]]
"""First position, positions, block table."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on two threads wait for each other wherever the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[n, heads, dim] after [m, kv heads, dim]: the last n of m positions, causal."""
    n, m, group = len(query), len(keys), HEADS // KV_HEADS
    out = torch.empty(n, HEADS * DIM)
    for place in range(n):
        seen = m - n + place + 1
        for head in range(HEADS):
            scores = keys[:seen, head // group] @ query[place, head] / math.sqrt(DIM)
            out[place, head * DIM : (head + 1) * DIM] = scores.softmax(0) @ values[:seen, head // group]
    return out


class Sequences:
    """Sequences in a paged cache, and what they hold in plain tensors."""

    def __init__(self, rows: Sequence[Row], *, layers: int = 2) -> None:
        self.rows, self.layers = list(rows), layers
        self.attention = TorchPagedAttention(
            num_layers=layers,
            num_blocks=BLOCKS,
            block_size=BLOCK,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            dtype=torch.float32,
        )
        self.attention._cache.fill_(math.nan)
        lengths = [start + count for start, count, _ in rows]
        self.keys = [[torch.randn(length, KV_HEADS, DIM) for length in lengths] for _ in range(layers)]
        self.values = [[torch.randn(length, KV_HEADS, DIM) for length in lengths] for _ in range(layers)]

    def fill_context(self) -> None:
        """Compute what lies before each row's first position, a sequence at a time."""
        for index, (start, _, table) in enumerate(self.rows):
            if start:
                self._attend(0, start, [(index, 0, start, table)])

    def check(self) -> None:
        """Compute the rows in one step."""
        self._attend(None, None, [(index, *row) for index, row in enumerate(self.rows)])

    def _attend(
        self, begin: int | None, end: int | None, rows: list[tuple[int, int, int, list[int]]]
    ) -> None:
        self.attention.plan(batch([row[1:] for row in rows], BLOCK))
        for layer in range(self.layers):
            parts = [slice(start, start + count) for _, start, count, _ in rows]
            query = torch.randn(sum(count for _, _, count, _ in rows), HEADS, DIM)
            key = torch.cat([self.keys[layer][row[0]][part] for row, part in zip(rows, parts, strict=True)])
            value = torch.cat(
                [self.values[layer][row[0]][part] for row, part in zip(rows, parts, strict=True)]
            )
            out = self.attention.attend(layer, query, key, value)
            expected = [
                naive(q, self.keys[layer][row[0]][: part.stop], self.values[layer][row[0]][: part.stop])
                for q, row, part in zip(query.split([row[2] for row in rows]), rows, parts, strict=True)
            ]
            torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)


CASES: dict[str, list[Row]] = {
    "one decode, consecutive blocks": [(9, 1, [5, 6, 7])],
    "one decode, scattered blocks": [(9, 1, [12, 3, 30])],
    "one decode, blocks in descending order": [(11, 1, [7, 6, 5])],
    "one decode that fills its block": [(7, 1, [3, 4])],
    "first position of a block": [(8, 1, [9, 2, 14])],
    "decodes of like length": [(5, 1, [1, 8]), (6, 1, [9, 4]), (7, 1, [0, 20])],
    "decodes of equal full blocks": [(7, 1, [1, 8]), (7, 1, [9, 4])],
    "decodes of far lengths": [
        (1, 1, [0]),
        (30, 1, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 1, [20]),
        (14, 1, [30, 9, 31, 10]),
        (27, 1, [33, 32, 19, 18, 17, 16, 15]),
        (0, 1, [21]),
    ],
    "a prompt": [(0, 11, [4, 5, 6])],
    "a prompt on scattered blocks": [(0, 11, [9, 1, 6])],
    "a chunk after context": [(6, 7, [2, 3, 4, 5])],
    "a chunk after context on scattered blocks": [(6, 7, [2, 13, 7, 11])],
    "a chunk that begins a block": [(8, 3, [2, 13, 7])],
    "decodes and chunks mixed": [
        (5, 1, [1, 8]),
        (0, 9, [10, 12, 11]),
        (17, 1, [20, 21, 22, 23, 24]),
        (4, 5, [30, 3, 31]),
        (2, 1, [39]),
        (3, 2, [0, 5]),
    ],
    "wide table for a short row": [(1, 1, [6, 7, 8, 9]), (13, 1, [10, 11, 12, 13])],
}


@pytest.mark.parametrize("case", CASES)
def test_equals_attention_written_out(case: str) -> None:
    torch.manual_seed(0)
    sequences = Sequences(CASES[case])
    sequences.fill_context()
    sequences.check()


def test_a_block_that_held_nan_is_clean_for_its_next_owner() -> None:
    """Step by step from position 0, on blocks that a broken sequence left full of NaN."""
    torch.manual_seed(1)
    table = [11, 4, 17]
    for start in range(1, 10):
        sequences = Sequences([(start, 1, table), (start + 1, 1, [5, 6, 20])])
        for index, (before, _, blocks) in enumerate(sequences.rows):
            for position in range(before):
                sequences._attend(position, position + 1, [(index, position, 1, blocks)])
        sequences.check()


def test_a_permuted_table_changes_nothing() -> None:
    torch.manual_seed(2)
    query = torch.randn(2, HEADS, DIM)
    results = []
    for tables in ([[0, 1, 2], [3, 4, 5]], [[31, 2, 7], [9, 0, 16]]):
        torch.manual_seed(3)
        sequences = Sequences([(9, 1, tables[0]), (10, 1, tables[1])], layers=1)
        sequences.fill_context()
        sequences.attention.plan(batch(sequences.rows, BLOCK))
        key = torch.cat([keys[-1:] for keys in sequences.keys[0]])
        value = torch.cat([values[-1:] for values in sequences.values[0]])
        results.append(sequences.attention.attend(0, query, key, value))
    assert torch.equal(*results)


def test_only_the_cells_of_the_step_are_written() -> None:
    attention = Sequences([(0, 1, [0])]).attention
    attention.plan(batch([(3, 1, [2]), (0, 2, [7])], BLOCK))
    before = attention._cache.clone()
    attention.attend(
        1, torch.randn(3, HEADS, DIM), torch.randn(3, KV_HEADS, DIM), torch.randn(3, KV_HEADS, DIM)
    )
    # [layers, 2, kv_heads, cells, head_dim]
    changed = (attention._cache.nan_to_num(9e9) != before.nan_to_num(9e9)).any(dim=-1).any(dim=2)
    assert changed.nonzero().tolist() == [[1, kind, cell] for kind in (0, 1) for cell in (11, 28, 29)]
