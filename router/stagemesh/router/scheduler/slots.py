"""What the scheduler knows of the sequences that run, as columns indexed by slot."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.sequence import TOKEN_BITS, TOKENS_KEPT, Sampled, Sequence

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
        self._counts = np.zeros((3, max_slots), np.int64)
        """What starts from 0."""
        self.position, self.num_blocks, self.last_step = self._counts
        """Positions computed by steps made so far, KV blocks, and the last step made with a row of it: of a sequence that
        decodes the one that sampled its input."""
        self.end_position = np.zeros(max_slots, np.int64)
        self.tables = np.zeros((max_slots, max_blocks), np.int64)
        self.tokens_left = np.zeros(max_slots, np.int64)
        """Until max_tokens, of those that came back."""
        self.last_token_at = np.zeros(max_slots)
        self._sampled = np.zeros(max_slots * TOKENS_KEPT, np.uint64)
        """As `Sequence.chunks`: TOKENS_KEPT places for each slot, end to end."""
        self._first = np.zeros(max_slots, np.int64)
        self._filled = np.zeros(max_slots, np.int64)
        """By slot: the places in there between which its tokens are."""
        self._num_tenancies = 0

    def admit(self, sequence: Sequence) -> None:
        """Give it a slot; its columns start from nothing."""
        slot = self.free.pop()
        self._num_tenancies += 1
        sequence.slot = slot
        self.sequences[slot] = sequence
        self.tenancy[slot] = self._num_tenancies
        self._counts[:, slot] = 0
        self.end_position[slot] = sequence.request.num_positions
        self.last_token_at[slot] = 0.0
        generated = sequence.num_generated if sequence.num_preemptions else 0
        self.tokens_left[slot] = sequence.request.max_tokens - generated
        # Sequences that started together would all be full, and put away, in the same step.
        self._first[slot] = self._filled[slot] = slot * TOKENS_KEPT + slot % TOKENS_KEPT
        sequence.buffer = lambda: self._buffer(slot)

    def vacate(self, slots: Int64) -> None:
        """Take them from their sequences; what their buffers hold is put away with each."""
        leaving = self.sequences[slots].tolist()
        self._put_away(slots)
        for sequence in leaving:
            sequence.buffer = None
            sequence.slot = -1
        self.sequences[slots] = None
        self.tenancy[slots] = 0
        self.decoding[slots] = False
        self.free += slots.tolist()

    def append(self, slots: Int64, tokens: npt.NDArray[np.uint32], number: int) -> None:
        """A token for each of these slots, sampled by step `number`."""
        filled = self._filled[slots]
        self._sampled[filled] = tokens | np.uint64(number << TOKEN_BITS)
        filled += 1
        self._filled[slots] = filled
        full = slots[filled % TOKENS_KEPT == 0]
        if len(full):
            self._put_away(full)

    def unseen(self, slots: Int64) -> Int64:
        """Tokens of these sequences, all decoding, that steps sample whose results are not here."""
        # A step that samples moves on by one position, and the last token is never computed.
        to_sample = self.end_position[slots] - self.position[slots]
        return self.tokens_left[slots] - to_sample

    def _buffer(self, slot: int) -> Sampled:
        return self._sampled[int(self._first[slot]) : int(self._filled[slot])]

    def _put_away(self, slots: Int64) -> None:
        columns = (slots, self._first[slots], self._filled[slots])
        for slot, first, filled in zip(*(column.tolist() for column in columns), strict=True):
            if filled > first:
                self.sequences[slot].chunks.append(self._sampled[first:filled].copy())
        self._first[slots] = self._filled[slots] = slots * TOKENS_KEPT
