"""What the scheduler knows of the sequences that run, as columns indexed by slot."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.sequence import TOKENS_KEPT, Sequence

Int64 = npt.NDArray[np.int64]
NO_TOKENS = np.zeros(0, np.uint32)


class SlotColumns:
    """Columns of [max_slots].

    Args:
        max_slots: Sequences running at once.
        max_blocks: KV blocks of one at most.
    """

    def __init__(self, max_slots: int, max_blocks: int) -> None:
        self.free = list(range(max_slots - 1, -1, -1))
        self.sequences = np.full(max_slots, None, np.object_)
        self.tenancy = np.zeros(max_slots, np.int64)
        """A new number for each admission: a step's rows are of the tenancy it was made in."""
        self.decoding = np.zeros(max_slots, np.bool_)
        self.position = np.zeros(max_slots, np.int64)
        """Computed by steps made so far."""
        self.end_position = np.zeros(max_slots, np.int64)
        self.num_blocks = np.zeros(max_slots, np.int64)
        self.tables = np.zeros((max_slots, max_blocks), np.int64)
        self.unseen = np.zeros(max_slots, np.int64)
        """Sampled by steps whose result is not here."""
        self.steps_in_flight = np.zeros(max_slots, np.int64)
        self.last_step = np.zeros(max_slots, np.int64)
        """That sampled it."""
        self.tokens_left = np.zeros(max_slots, np.int64)
        """Until max_tokens, of those that came back."""
        self.last_token_at = np.zeros(max_slots)
        self._tokens = np.zeros((max_slots, TOKENS_KEPT), np.uint32)
        self._steps = np.zeros((max_slots, TOKENS_KEPT), np.int64)
        self._first = np.zeros(max_slots, np.int64)
        self._filled = np.zeros(max_slots, np.int64)
        self._num_tenancies = 0

    def admit(self, sequence: Sequence) -> None:
        """Give it a slot; its columns start from nothing."""
        slot = self.free.pop()
        self._num_tenancies += 1
        sequence.slot = slot
        self.sequences[slot] = sequence
        self.tenancy[slot] = self._num_tenancies
        self.decoding[slot] = False
        self.position[slot] = 0
        self.end_position[slot] = sequence.request.num_positions
        self.num_blocks[slot] = 0
        self.unseen[slot] = 0
        self.steps_in_flight[slot] = 0
        self.last_step[slot] = 0
        self.last_token_at[slot] = 0.0
        self.tokens_left[slot] = sequence.request.max_tokens - sequence.num_generated
        # Sequences that started together would all be full, and put away, in the same step.
        self._first[slot] = self._filled[slot] = slot % TOKENS_KEPT
        sequence.buffer = lambda: self._buffer(slot)

    def vacate(self, sequence: Sequence) -> None:
        """Take its slot; what its buffer holds is put away with it."""
        slot = sequence.slot
        self._put_away(slot)
        sequence.buffer = None
        sequence.slot = -1
        self.sequences[slot] = None
        self.tenancy[slot] = 0
        self.decoding[slot] = False
        self.free.append(slot)

    def append(self, slots: Int64, tokens: npt.NDArray[np.uint32], number: int) -> None:
        """A token for each of these slots, sampled by step `number`."""
        filled = self._filled[slots]
        self._tokens[slots, filled] = tokens
        self._steps[slots, filled] = number
        filled += 1
        self._filled[slots] = filled
        for slot in slots[filled == TOKENS_KEPT].tolist():
            self._put_away(slot)

    def _buffer(self, slot: int) -> tuple[npt.NDArray[np.uint32], Int64]:
        part = slice(int(self._first[slot]), int(self._filled[slot]))
        return self._tokens[slot, part], self._steps[slot, part]

    def _put_away(self, slot: int) -> None:
        tokens, steps = self._buffer(slot)
        if len(tokens):
            self.sequences[slot].chunks.append((tokens.copy(), steps.copy()))
        self._first[slot] = self._filled[slot] = 0
