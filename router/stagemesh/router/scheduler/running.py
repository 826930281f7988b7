"""The sequences that have a slot: their KV blocks, and what the stages must be told of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.blocks import BlockPool
from stagemesh.router.scheduler.limits import Limits
from stagemesh.router.scheduler.prefix_index import block_keys
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.scheduler.slots import SlotColumns
from stagemesh.router.scheduler.step import Changes

Int64 = npt.NDArray[np.int64]


class Running:
    """Slots and blocks of one lane.

    Args:
        limits: Of the lane.
        on_yielded: Called with a sequence that gave up its slot and is to be computed again.
        oldest_in_flight: Says the number of the oldest unanswered step; 0 if there is none.
    """

    def __init__(
        self, limits: Limits, on_yielded: Callable[[Sequence], None], oldest_in_flight: Callable[[], int]
    ) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.block_size, runs=limits.consecutive_blocks)
        self.slots = SlotColumns(limits.max_slots, limits.max_blocks)
        self.changes = Changes()
        # By order of arrival; a dict, since many enter and leave.
        self.prefilling: dict[int, Sequence] = {}
        self.yielding: dict[int, Sequence] = {}
        self.backlog = 0
        """Positions of prompts to compute, of those that run and those that wait."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._on_yielded = on_yielded
        self._oldest_in_flight = oldest_in_flight

    def take_changes(self) -> Changes:
        """What has changed since the last step; the stages hear of it in the next."""
        changes, self.changes = self.changes, Changes()
        return changes

    # Coming

    def admit(self, sequence: Sequence) -> None:
        """Give it a slot, and the blocks that already hold its beginning."""
        self.slots.admit(sequence)
        self._share_prefix(sequence)
        self.slots.position[sequence.slot] = sequence.first_position
        self.backlog -= sequence.first_position
        if self.limits.consecutive_blocks:
            sequence.claim = self.pool.claim(self._claim_room(sequence))
        self.prefilling[sequence.order] = sequence
        self.changes.admitted.append(sequence)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether the whole of its prompt and a token fit what is free; blocks that others of its prefix own cost nothing."""
        needed = self.prompt_blocks(sequence)
        if needed <= self.pool.num_free:
            return True
        return needed - self.pool.num_owned(self._prefix(sequence)) <= self.pool.num_free

    def prompt_blocks(self, sequence: Sequence) -> int:
        """That its prompt and a token take."""
        return len(sequence.to_prefill) // self.limits.block_size + 1

    def _prefix(self, sequence: Sequence) -> list[int]:
        return self.pool.match(sequence.to_prefill, sequence.keys) if self.limits.prefix_cache else []

    def _share_prefix(self, sequence: Sequence) -> None:
        blocks = self._prefix(sequence)
        del sequence.keys[len(blocks) :]
        sequence.first_position = len(blocks) * self.limits.block_size
        if blocks:
            shared = np.array(blocks, np.int64)
            self.pool.share(shared)
            self.slots.tables[sequence.slot, : len(blocks)] = shared
            self.slots.num_blocks[sequence.slot] = len(blocks)
            self.changes.append([sequence.slot] * len(blocks), blocks)
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.first_position
            self.num_prompt_tokens += len(sequence.to_prefill)
            self.num_cached_tokens += sequence.first_position

    # Growing

    def grow_all(self, slots: Int64) -> None:
        """One more block for each of these decoding sequences; the caller has seen that they are there."""
        have = self.slots.num_blocks[slots]
        blocks = self.pool.take_next(self.slots.tables[slots, have - 1])
        self.slots.tables[slots, have] = blocks
        self.slots.num_blocks[slots] = have + 1
        self.changes.append(slots.tolist(), blocks.tolist())

    def grow(self, sequence: Sequence) -> bool:
        """One more block for a decoding sequence; if there is none, somebody yields, it itself perhaps."""
        if not self.pool.num_free and not self.yielding:
            self.ask_to_yield(self.victim())
        if sequence.slot < 0 or not self.slots.decoding[sequence.slot] or not self.pool.num_free:
            return False
        self._append(sequence, int(self.slots.num_blocks[sequence.slot]), 1)
        return True

    def chunk(self, sequence: Sequence, position: int, most: int) -> int:
        """Positions of its next chunk, from `position` on, `most` at most, with blocks for them; 0 if there are no
        blocks now."""
        size = self.limits.block_size
        have = int(self.slots.num_blocks[sequence.slot])
        room = have * size - position
        if not room and not self.pool.num_free and not self.yielding:
            victim = self.victim()
            if victim is not sequence:
                self.ask_to_yield(victim)
        count = min(len(sequence.to_prefill) - position, most, room + self.pool.num_free * size)
        needed = -(-(position + count) // size) - have
        if needed > 0:
            self._append(sequence, have, needed)
        return count

    def _append(self, sequence: Sequence, have: int, count: int) -> None:
        """`count` blocks more than it has; the caller has seen that they are there."""
        slot = sequence.slot
        owned = have - sequence.first_position // self.limits.block_size
        first = int(self.slots.tables[slot, have - 1]) + 1 if owned else sequence.claim
        blocks = self.pool.take(count, first)
        self.slots.tables[slot, have : have + count] = blocks
        self.slots.num_blocks[slot] = have + count
        self.changes.append([slot] * count, blocks)

    def _claim_room(self, sequence: Sequence) -> int:
        return -(-sequence.request.num_positions // self.limits.block_size)

    # Sharing

    def publish(self, sequence: Sequence, position: int, known: npt.NDArray[np.uint32]) -> None:
        """Make its full blocks known: those whose tokens are `known` and computed, by steps already made, up to
        `position`."""
        size, keys = self.limits.block_size, sequence.keys
        first, end = len(keys), min(position, len(known)) // size
        if first < end:
            more = block_keys(keys[-1] if keys else b"", known[first * size : end * size], size)
            self.pool.publish(more, self.slots.tables[sequence.slot, first:end].tolist())
            keys += more

    # Leaving

    def vacate(self, sequences: list[Sequence]) -> None:
        """Their slots and blocks are free; the stages hear of it in the next step.

        What they generated becomes known to the prefix cache now, when their tokens have come back, and not block
        by block: whoever could use it comes later.
        """
        slots = np.array([sequence.slot for sequence in sequences])
        for sequence, position in zip(sequences, self.slots.position[slots].tolist(), strict=True):
            self.backlog -= max(len(sequence.to_prefill) - position, 0)
            if self.limits.prefix_cache and position // self.limits.block_size > len(sequence.keys):
                self.publish(sequence, position, sequence.history)
            self.pool.drop_claim(sequence.claim, self._claim_room(sequence))
            sequence.claim = -1
            self.prefilling.pop(sequence.order, None)
            self.yielding.pop(sequence.order, None)
        left = slots.tolist()
        counts = self.slots.num_blocks[slots].tolist()
        tables = [self.slots.tables[slot, :count] for slot, count in zip(left, counts, strict=True)]
        self.pool.give_back(np.concatenate(tables))
        self.changes.release(left)
        self.slots.vacate(slots)

    def in_flight(self, sequence: Sequence) -> bool:
        """Whether a step with a row of this running sequence is unanswered."""
        oldest = self._oldest_in_flight()
        return 0 < oldest <= int(self.slots.last_step[sequence.slot])

    def victim(self) -> Sequence:
        """Who yields: the lowest priority, and of those the youngest."""
        youngest: Sequence = max(
            (sequence for sequence in self.slots.sequences if sequence is not None),
            key=lambda sequence: sequence.waits_before,
        )
        return youngest

    def ask_to_yield(self, sequence: Sequence) -> None:
        """It takes no further step, and leaves when none of its steps is in flight (rule 3)."""
        self.slots.decoding[sequence.slot] = False
        self.prefilling.pop(sequence.order, None)
        self.yielding[sequence.order] = sequence
        self.yield_idle()

    def yield_idle(self) -> None:
        """Those who were asked to yield leave once nothing of theirs is in flight."""
        for sequence in [one for one in self.yielding.values() if not self.in_flight(one)]:
            self.vacate([sequence])
            sequence.to_prefill = sequence.history
            sequence.num_preemptions += 1
            self.num_preemptions += 1
            self._on_yielded(sequence)
