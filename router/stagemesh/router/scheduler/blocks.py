"""The free list of a lane's KV blocks.

Blocks are handed out in runs where there is one: a CPU stage reads a sequence whose blocks are
consecutive in place instead of gathering it. So a new owner claims the run it may come to need. A claim
keeps other newcomers away and nothing more: when nothing unclaimed is free, claimed blocks are taken.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.int64]


class BlockPool:
    """Which of `num_blocks` blocks are free. A block has one owner or none."""

    def __init__(self, num_blocks: int) -> None:
        # The sentinel at the end is never free: "the block after the last" needs no special case.
        self._free = np.ones(num_blocks + 1, np.bool_)
        self._free[num_blocks] = False
        self._claimed = np.zeros(num_blocks, np.bool_)
        self._num_free = num_blocks
        # Every free block is on the stack; one that was taken out of turn is dropped when it comes up.
        self._stack = list(range(num_blocks))
        self._on_stack = np.ones(num_blocks, np.bool_)

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return self._num_free

    @property
    def num_blocks(self) -> int:
        """Of the lane."""
        return len(self._claimed)

    def claim(self, room: int) -> int:
        """Claim a run of `room` free blocks for a new owner; returns where it begins, -1 if there is none.

        The shortest run that is long enough, so that long ones stay whole.
        """
        edges = np.flatnonzero(np.diff(self._free[:-1] & ~self._claimed, prepend=False, append=False))
        begins, ends = edges[::2], edges[1::2]
        fitting = np.flatnonzero(ends - begins >= room)
        if not len(fitting):
            return -1
        begin = int(begins[fitting[(ends - begins)[fitting].argmin()]])
        self._claimed[begin : begin + room] = True
        return begin

    def drop_claim(self, begin: int, room: int) -> None:
        """The owner that claimed the run has left."""
        if begin >= 0:
            self._claimed[begin : begin + room] = False

    def take(self, count: int, first: int = -1) -> Blocks:
        """Hand out `count` blocks; the caller has seen that they are there.

        Args:
            count: At most `num_free`.
            first: Where they should begin, if all of that run is free; -1 for anywhere.
        """
        assert count <= self._num_free
        if first >= 0 and first + count < len(self._free) and self._free[first : first + count].all():
            blocks = np.arange(first, first + count)
        else:
            blocks = np.array([self._pop() for _ in range(count)], np.int64)
        self._free[blocks] = False
        self._num_free -= count
        return blocks

    def take_next(self, last: Blocks) -> Blocks:
        """One more block for each owner, the one after its last where that is free.

        Args:
            last: Distinct blocks, at most `num_free`.
        """
        assert len(last) <= self._num_free
        blocks = last + 1
        follows = self._free[blocks]
        self._free[blocks[follows]] = False
        blocks[~follows] = [self._pop() for _ in range(len(last) - int(np.count_nonzero(follows)))]
        self._num_free -= len(last)
        return blocks

    def give_back(self, blocks: Blocks) -> None:
        """The owner is done with them. Steps in flight may still write them: a later owner's come after."""
        assert not self._free[blocks].any()
        self._free[blocks] = True
        self._num_free += len(blocks)
        fresh = blocks[~self._on_stack[blocks]]
        self._on_stack[fresh] = True
        self._stack += fresh.tolist()

    def _pop(self) -> int:
        passed_over: list[int] = []
        while True:
            # Nothing unclaimed is left when the stack runs out: claims give way.
            if not self._stack:
                self._stack, passed_over = passed_over[::-1], []
                self._claimed[:] = False
            block = self._stack.pop()
            if not self._free[block]:
                self._on_stack[block] = False
            elif self._claimed[block]:
                passed_over.append(block)
            else:
                self._stack += passed_over[::-1]
                self._on_stack[block] = False
                self._free[block] = False
                return block
