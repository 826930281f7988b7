"""The sequences of a lane as columns: positions, block tables and sampling parameters live here and
advance here; a step carries only what changed (docs/architecture.md, "Steps").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagemesh.stage.engine.batch import NO_CHANGES, Batch, BlockChanges, SamplingColumns
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import F32, U8, U32, U64, unpack
from stagemesh.wire.errors import InvalidArgumentError

ROWS_KEPT = 1024
"""Steps back that `same_rows_as` may name."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class SlotTable:
    """State of every slot of a lane on one stage.

    Args:
        max_slots: Slots; a slot id is below it.
        max_blocks: KV blocks a slot may hold: the longest context over the block size.
        block_size: Tokens of a block.
        num_blocks: Blocks of the lane; a block id is below it.
    """

    max_slots: int
    max_blocks: int
    block_size: int
    num_blocks: int
    positions: Int64 = field(init=False)
    tables: Int32 = field(init=False)
    num_table_blocks: Int32 = field(init=False)
    seeds: npt.NDArray[np.uint64] = field(init=False)
    temperatures: npt.NDArray[np.float32] = field(init=False)
    top_ks: Int32 = field(init=False)
    top_ps: npt.NDArray[np.float32] = field(init=False)
    sampled_by: npt.NDArray[np.uint64] = field(init=False)
    """The last step that sampled the slot; 0: none since it was admitted."""
    tokens: Int64 = field(init=False)
    """The token of that step, once it has come back."""
    _history: dict[int, Int64] = field(init=False, default_factory=dict)
    """Whom a step sampled, so that its tokens and a later step's `same_rows_as` find their slots."""

    def __post_init__(self) -> None:
        count = self.max_slots
        self.positions = np.zeros(count, np.int64)
        self.tables = np.zeros((count, self.max_blocks), np.int32)
        self.num_table_blocks = np.zeros(count, np.int32)
        self.seeds = np.zeros(count, np.uint64)
        self.temperatures = np.zeros(count, np.float32)
        self.top_ks = np.zeros(count, np.int32)
        self.top_ps = np.ones(count, np.float32)
        self.sampled_by = np.zeros(count, np.uint64)
        self.tokens = np.zeros(count, np.int64)

    def apply(self, step: stage_pb2.Step) -> Batch:
        """Take a step's changes and make its batch; positions have advanced when it returns.

        It may be called before tokens of earlier steps have come: who sampled last changes in `begin`.
        """
        self._release(step)
        self._admit(step.admissions)
        changes = self._append_blocks(step)
        slots, counts, input_steps, tokens, sample = self._rows(step)
        batch = self._batch(step.number, slots, counts, input_steps, tokens, sample, changes)
        self.positions[slots] += counts
        return batch

    def begin(self, batch: Batch) -> None:
        """The batch runs now: all it needed has come."""
        self.sampled_by[batch.sampled_slots] = batch.number
        self._history[batch.number] = batch.sampled_slots
        self._history.pop(batch.number - ROWS_KEPT, None)

    def deliver(self, number: int, tokens: Int64) -> None:
        """The tokens that step `number` sampled. A slot given away since takes none of them."""
        slots = self._history.get(number, np.zeros(0, np.int64))
        if len(slots) != len(tokens):
            raise InvalidArgumentError(
                f"{len(tokens)} tokens came for step {number}, which sampled {len(slots)} rows",
                reason="BAD_RING",
            )
        current = self.sampled_by[slots] == number
        self.tokens[slots[current]] = tokens[current]

    def _release(self, step: stage_pb2.Step) -> None:
        slots = self._slots(step.release_slots, "release_slots")
        self.num_table_blocks[slots] = 0
        self.sampled_by[slots] = 0

    def _admit(self, admissions: stage_pb2.Admissions) -> None:
        if not admissions.slots:
            return
        slots = self._slots(admissions.slots, "admissions.slots")
        count = len(slots)
        self.positions[slots] = unpack(admissions.positions, U32, "admissions.positions", count)
        self.seeds[slots] = unpack(admissions.seeds, U64, "admissions.seeds", count)
        self.temperatures[slots] = unpack(admissions.temperatures, F32, "admissions.temperatures", count)
        self.top_ks[slots] = unpack(admissions.top_ks, U32, "admissions.top_ks", count)
        self.top_ps[slots] = unpack(admissions.top_ps, F32, "admissions.top_ps", count)
        self.num_table_blocks[slots] = 0
        self.sampled_by[slots] = 0

    def _append_blocks(self, step: stage_pb2.Step) -> BlockChanges:
        if not step.append_slots and not step.append_blocks:
            return NO_CHANGES
        slots = self._slots(step.append_slots, "append_slots")
        blocks = unpack(step.append_blocks, U32, "append_blocks", len(slots))
        if blocks.max() >= self.num_blocks:
            raise InvalidArgumentError(
                f"append_blocks names block {blocks.max()} of {self.num_blocks}", field="append_blocks"
            )
        # Several blocks for one slot in one step: each goes one further than the one before it.
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        counts = np.diff(np.r_[first, len(ordered)])
        rank = np.arange(len(ordered)) - np.repeat(first, counts)
        index = self.num_table_blocks[ordered] + rank
        if index.max() >= self.max_blocks:
            slot = ordered[index.argmax()]
            raise InvalidArgumentError(
                f"slot {slot} gets block {index.max() + 1} of {self.max_blocks}", field="append_slots"
            )
        self.tables[ordered, index] = blocks[order]
        self.num_table_blocks[ordered[first]] += counts.astype(np.int32)
        return BlockChanges(
            slots=ordered, indexes=index.astype(np.int64), blocks=blocks[order].astype(np.int64)
        )

    def _rows(
        self, step: stage_pb2.Step
    ) -> tuple[Int64, Int64, npt.NDArray[np.uint64], Int64, npt.NDArray[np.bool_]]:
        if step.WhichOneof("work") == "same_rows_as":
            earlier = self._history.get(step.same_rows_as)
            if earlier is None:
                raise InvalidArgumentError(
                    f"step {step.number} repeats the rows of step {step.same_rows_as}, which is not among the last {ROWS_KEPT}",
                    field="same_rows_as",
                )
            count = len(earlier)
            inputs = np.full(count, step.same_rows_as, np.uint64)
            return earlier, np.ones(count, np.int64), inputs, np.zeros(0, np.int64), np.ones(count, np.bool_)
        rows = step.rows
        slots = self._slots(rows.slots, "rows.slots")
        count = len(slots)
        counts = (
            unpack(rows.counts, U32, "rows.counts", count).astype(np.int64)
            if rows.counts
            else np.ones(count, np.int64)
        )
        inputs = (
            unpack(rows.input_steps, U64, "rows.input_steps", count)
            if rows.input_steps
            else np.zeros(count, np.uint64)
        )
        sample = (
            unpack(rows.sample, U8, "rows.sample", count).astype(np.bool_)
            if rows.sample
            else np.ones(count, np.bool_)
        )
        self._check_rows(step.number, slots, counts, inputs)
        given = int(counts[inputs == 0].sum())
        tokens = unpack(rows.tokens, U32, "rows.tokens", given).astype(np.int64)
        return slots, counts, inputs, tokens, sample

    def _check_rows(self, number: int, slots: Int64, counts: Int64, inputs: npt.NDArray[np.uint64]) -> None:
        wrong = np.flatnonzero((counts == 0) | ((inputs > 0) & (counts != 1)))
        if len(wrong):
            slot, count, given = slots[wrong[0]], counts[wrong[0]], inputs[wrong[0]]
            source = f" with the token of step {given}" if given else ""
            raise InvalidArgumentError(
                f"step {number}: slot {slot} computes {count} positions{source}", field="rows.counts"
            )
        if len(np.unique(slots)) != len(slots):
            raise InvalidArgumentError(f"step {number} names a slot twice", field="rows.slots")

    def _batch(
        self,
        number: int,
        slots: Int64,
        counts: Int64,
        input_steps: npt.NDArray[np.uint64],
        tokens: Int64,
        sample: npt.NDArray[np.bool_],
        changes: BlockChanges,
    ) -> Batch:
        starts = self.positions[slots]
        ends = starts + counts
        needed = -(-ends // self.block_size)
        if (needed > self.num_table_blocks[slots]).any():
            short = slots[needed > self.num_table_blocks[slots]][0]
            raise InvalidArgumentError(
                f"step {number} computes up to position {int(self.positions[short])}+ of slot {short}, "
                f"which has {self.num_table_blocks[short]} blocks of {self.block_size}",
                field="append_blocks",
            )
        from_ring = input_steps > 0
        if (self.sampled_by[slots[from_ring]] != input_steps[from_ring]).any():
            raise InvalidArgumentError(
                f"step {number} takes a token from a step that did not sample its slot last",
                field="rows.input_steps",
            )
        total = int(counts.sum())
        offsets = np.cumsum(counts) - counts
        positions = np.repeat(starts - offsets, counts) + np.arange(total)
        row_of = np.repeat(np.arange(len(slots)), counts)
        tables = self.tables[slots, : int(needed.max(initial=0))]
        cells = tables[row_of, positions // self.block_size].astype(np.int64) * self.block_size
        cells += positions % self.block_size
        sampled = slots[sample]
        return Batch(
            number=number,
            slots=slots,
            counts=counts,
            starts=starts,
            offsets=offsets,
            positions=positions,
            cells=cells,
            tables=tables,
            input_steps=input_steps,
            given_tokens=tokens,
            sampled_slots=sampled,
            sampled_rows=(offsets + counts - 1)[sample],
            sampling=SamplingColumns(
                seeds=self.seeds[sampled],
                positions=ends[sample],
                temperatures=self.temperatures[sampled],
                top_ks=self.top_ks[sampled],
                top_ps=self.top_ps[sampled],
            ),
            changes=changes,
        )

    def input_tokens(self, batch: Batch, *, held: bool = False) -> Int64:
        """The token of every flat position of the batch: from the step, or sampled by an earlier one.

        With `held` the engine has the sampled ones: -1 - slot stands for the last token of a slot.
        """
        from_ring = batch.input_steps > 0
        if not from_ring.any():
            return batch.given_tokens
        tokens = np.empty(len(batch.positions), np.int64)
        ring_cells = batch.offsets[from_ring]
        given = np.ones(len(tokens), np.bool_)
        given[ring_cells] = False
        tokens[given] = batch.given_tokens
        from_slots = batch.slots[from_ring]
        tokens[ring_cells] = -1 - from_slots if held else self.tokens[from_slots]
        return tokens

    def _slots(self, data: bytes, name: str) -> Int64:
        slots = unpack(data, U32, name).astype(np.int64)
        if len(slots) and slots.max() >= self.max_slots:
            raise InvalidArgumentError(f"{name} names slot {slots.max()} of {self.max_slots}", field=name)
        return slots
