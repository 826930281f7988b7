"""The KV blocks of a lane: which are free, which are owned, and by how many.

Where a stage wants it, blocks are handed out in runs where there is one: a CPU stage reads a sequence whose blocks
are consecutive in place instead of gathering it. So a new owner claims the run it may come to need. A claim
keeps other newcomers away and nothing more: when nothing unclaimed is free, claimed blocks are taken.

A block whose prefix is published keeps what it holds when its last owner leaves, until the room is needed:
then the one that was left longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.prefix_index import PrefixIndex, Tokens

Blocks = npt.NDArray[np.int64]


class BlockPool:
    """Which of `num_blocks` blocks are free; a block has owners or is free, or kept for its prefix.

    Args:
        num_blocks: Of the lane.
        block_size: Tokens of a block.
        runs: Whether it matters that an owner's blocks follow each other. Where it does not, nothing is claimed and any
            block will do.
    """

    def __init__(self, num_blocks: int, block_size: int, *, runs: bool = True) -> None:
        self._runs = runs
        # The sentinel at the end is never free: "the block after the last" needs no special case.
        self._free = np.ones(num_blocks + 1, np.bool_)
        self._free[num_blocks] = False
        self._claimed = np.zeros(num_blocks, np.bool_)
        self._num_free = num_blocks
        self._owners = np.zeros(num_blocks, np.int64)
        self._index = PrefixIndex(block_size)
        self._kept: OrderedDict[int, None] = OrderedDict()
        # Every free block is on the stack; one that was taken out of turn, for a run, is dropped when it comes up.
        self._stack = list(range(num_blocks))
        self._on_stack = np.ones(num_blocks, np.bool_)

    @property
    def num_free(self) -> int:
        """Blocks nobody owns, those kept for their prefix included."""
        return self._num_free + len(self._kept)

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

    def take(self, count: int, first: int = -1) -> list[int]:
        """Hand out `count` blocks; the caller has seen that they are there.

        Args:
            count: At most `num_free`.
            first: Where they should begin, if all of that run is free; -1 for anywhere.
        """
        if self._num_free < count:
            self._make_room(count)
        run = slice(first, first + count)
        if self._runs and first >= 0 and run.stop < len(self._free) and self._free[run].all():
            blocks = list(range(run.start, run.stop))
            self._free[run] = False
            self._owners[run] = 1
        else:
            blocks = self._pop_all(count)
        self._num_free -= count
        return blocks

    def take_next(self, last: Blocks) -> Blocks:
        """One more block for each owner, the one after its last where that is free.

        Args:
            last: Distinct blocks, at most `num_free`.
        """
        if self._num_free < len(last):
            self._make_room(len(last))
        if not self._runs:
            self._num_free -= len(last)
            return np.array(self._pop_all(len(last)))
        blocks = last + 1
        follows = self._free[blocks]
        following = blocks[follows]
        self._free[following] = False
        self._owners[following] = 1
        if len(following) < len(last):
            blocks[~follows] = self._pop_all(len(last) - len(following))
        self._num_free -= len(last)
        return blocks

    def match(self, tokens: Tokens, keys: list[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of `tokens`, whose first keys may be known; more are added."""
        return self._index.match(tokens, keys)

    def num_owned(self, blocks: list[int]) -> int:
        """How many of them somebody owns: one more owner takes nothing from the free ones."""
        return int(np.count_nonzero(self._owners[blocks]))

    def share(self, blocks: Blocks) -> None:
        """One more owner for blocks that `match` gave."""
        for block in blocks[self._owners[blocks] == 0].tolist():
            del self._kept[block]
        self._owners[blocks] += 1

    def publish(self, keys: list[bytes], blocks: list[int]) -> None:
        """Owned blocks now hold prefixes, by their keys, that steps made from now on may share."""
        self._index.publish(keys, blocks)

    def give_back(self, blocks: Blocks) -> None:
        """Their owners are done with them. Steps in flight may still write them: a later owner's come after.

        Args:
            blocks: Those of each owner in the order of its positions; a shared one once for each owner that leaves.
        """
        known = self._index.blocks
        if not known:  # and so nothing is shared
            assert np.count_nonzero(self._owners[blocks] == 1) == len(blocks)
            self._owners[blocks] = 0
            self._set_free(blocks)
            return
        np.subtract.at(self._owners, blocks, 1)
        owners = self._owners[blocks]
        assert (owners >= 0).all()
        left = blocks[owners == 0].tolist()
        # The end of a prefix is worth less than its beginning, so it is the first to go.
        self._kept.update(dict.fromkeys(block for block in reversed(left) if block in known))
        # What is not known was never shared, so it is here once.
        self._set_free(np.array([block for block in left if block not in known], np.int64))

    def _make_room(self, count: int) -> None:
        assert count <= self.num_free
        evicted: list[int] = []
        while self._num_free + len(evicted) < count:
            block, _ = self._kept.popitem(last=False)
            self._index.forget(block)
            evicted.append(block)
        self._set_free(np.array(evicted, np.int64))

    def _set_free(self, blocks: Blocks) -> None:
        self._free[blocks] = True
        self._num_free += len(blocks)
        if self._runs:
            blocks = blocks[~self._on_stack[blocks]]
            self._on_stack[blocks] = True
        self._stack += blocks.tolist()

    def _pop_all(self, count: int) -> list[int]:
        """What so many times `_pop` gives, at once where no claim is in the way."""
        blocks: list[int] = []
        stack = self._stack
        if not self._runs:
            blocks = stack[: -count - 1 : -1]
            del stack[len(stack) - count :]
        while (missing := count - len(blocks)) and stack:
            top = stack[: -missing - 1 : -1]
            looked_at = np.array(top)
            free = self._free[looked_at]
            if self._claimed[looked_at[free]].any():
                break
            del stack[-len(top) :]
            self._on_stack[looked_at] = False
            blocks += top if free.all() else looked_at[free].tolist()
        taken = np.array(blocks, np.int64)
        self._free[taken] = False
        self._owners[taken] = 1
        return blocks + [self._pop() for _ in range(count - len(blocks))]

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
                self._owners[block] = 1
                return block
