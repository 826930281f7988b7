"""One step as an engine sees it: flat columns over rows and positions, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingColumns:
    """Parameters of the sampled rows, in row order; all of length S."""

    seeds: npt.NDArray[np.uint64]
    positions: Int64
    """Position the sampled token will have in its sequence: the counter of its random numbers."""
    temperatures: npt.NDArray[np.float32]
    top_ks: Int32
    top_ps: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChanges:
    """Blocks that joined block tables with a step: blocks[i] became entry indexes[i] of the table of slots[i]."""

    slots: Int64
    indexes: Int64
    blocks: Int64

    def __len__(self) -> int:
        return len(self.slots)


NO_CHANGES = BlockChanges(
    slots=np.zeros(0, np.int64), indexes=np.zeros(0, np.int64), blocks=np.zeros(0, np.int64)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of a step. R rows, T positions in all (T is the sum of counts), S sampled rows."""

    number: int
    slots: Int64
    """[R]"""
    counts: Int64
    """[R] positions to compute."""
    starts: Int64
    """[R] first position; the KV of those before it is in the cache."""
    offsets: Int64
    """[R] where the row starts among the T flat positions."""
    positions: Int64
    """[T] position within the sequence."""
    cells: Int64
    """[T] cell of the KV cache that the position writes: block * block_size + offset."""
    tables: Int32
    """[R, blocks] block table of each row, as wide as the longest needs."""
    input_steps: npt.NDArray[np.uint64]
    """[R] step whose sample is the row's input; 0: given in the step."""
    given_tokens: Int64
    """Tokens of the rows with input step 0, flat."""
    sampled_slots: Int64
    """[S]"""
    sampled_rows: Int64
    """[S] flat index of the last position of each sampled row."""
    sampling: SamplingColumns
    changes: BlockChanges = NO_CHANGES
    """For engines that keep the block tables on a device."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.positions)

    @property
    def newest_input(self) -> int:
        """The latest step whose sample this one needs; 0: none."""
        return int(self.input_steps.max(initial=0))
