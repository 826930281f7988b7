"""The free list of a lane's KV blocks.

Blocks are handed out in runs where there is one: a CPU stage reads a sequence whose blocks are
consecutive in place instead of gathering it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.uint32]


class BlockPool:
    """Which of `num_blocks` blocks are free. A block has one owner or none."""

    def __init__(self, num_blocks: int) -> None:
        self._free = np.ones(num_blocks, np.bool_)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return self._num_free

    @property
    def num_blocks(self) -> int:
        """Of the lane."""
        return len(self._free)

    def take(self, count: int, after: int = -1, room: int = 0) -> Blocks:
        """Hand out `count` blocks; the caller has seen that they are there.

        Args:
            count: At most `num_free`.
            after: The owner's last block: the next ones are preferred.
            room: Blocks the owner may come to need in all; a new owner starts where a run of that length
                is free, if there is one.
        """
        assert count <= self._num_free
        follow = slice(after + 1, after + 1 + count)
        if after >= 0 and follow.stop <= len(self._free) and self._free[follow].all():
            blocks = np.arange(follow.start, follow.stop)
        else:
            blocks = self._find(count, max(count, room))
        self._free[blocks] = False
        self._num_free -= count
        return blocks.astype(np.uint32)

    def give_back(self, blocks: Blocks) -> None:
        """The owner is done with them. Steps in flight may still write them: a later owner's come after."""
        assert not self._free[blocks].any()
        self._free[blocks] = True
        self._num_free += len(blocks)

    def _find(self, count: int, room: int) -> npt.NDArray[np.intp]:
        free = np.flatnonzero(self._free)
        breaks = np.flatnonzero(np.diff(free) != 1) + 1
        starts = np.r_[0, breaks]
        lengths = np.diff(np.r_[starts, len(free)])
        # Best fit: the shortest run with room; failing that the longest there is.
        fitting = np.flatnonzero(lengths >= room)
        if not len(fitting):
            fitting = np.flatnonzero(lengths >= count)
        if not len(fitting):
            return free[:count]
        best = fitting[lengths[fitting].argmin()]
        return free[starts[best] : starts[best] + count]
