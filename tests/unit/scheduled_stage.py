"""A stage for the scheduler's tests: it reads steps off the wire and computes with a KV cache of tokens.

The token after a sequence is a function of all tokens before it, read back through the block table. So a
block with two owners, a row too many, a wrong position or a token of somebody else shows in the answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler import Limits, Request
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U8, U32, U64, unpack

NUM_TOKENS = 40
END_TOKEN = 7


def next_token(history: Iterable[int]) -> int:
    """The model."""
    return zlib.crc32(np.array(list(history), "<u4").tobytes()) % NUM_TOKENS


def expected_answer(request: Request) -> list[int]:
    """What the model says to a request, whatever the schedule."""
    history = request.prompt.tolist()
    answer: list[int] = []
    while len(answer) < request.max_tokens and not (answer and answer[-1] in request.end_token_ids):
        answer.append(next_token(history + answer))
    return answer


@dataclass(slots=True)
class _Slot:
    position: int = 0
    blocks: list[int] = field(default_factory=list)
    sampled_by: int = 0


class ScheduledStage:
    """Runs steps in order, as the one stage of a lane.

    Args:
        limits: Of the lane.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._cells = np.full(limits.num_blocks * limits.block_size, -1, np.int64)
        self._live: dict[int, _Slot] = {}
        self._samples: dict[int, dict[int, int]] = {}
        """By step: the token of each slot it sampled."""
        self._number = 0

    @property
    def num_held_blocks(self) -> int:
        """Blocks in the tables of live slots."""
        return sum(len(slot.blocks) for slot in self._live.values())

    def run(self, step: stage_pb2.Step) -> npt.NDArray[np.uint32]:
        """The tokens the step samples, in row order."""
        assert step.number == self._number + 1
        self._number = step.number
        self._change(step)
        samples: dict[int, int] = {}
        slots, counts, inputs, tokens, sample = self._rows(step)
        assert len(set(slots)) == len(slots) > 0
        for index, count, source, sampled in zip(slots, counts, inputs, sample, strict=True):
            slot = self._live[index]
            if source:
                assert count == 1
                assert slot.sampled_by == source, "a row takes a token that its slot did not sample last"
                row = [self._samples[source][index]]
            else:
                row, tokens = tokens[:count], tokens[count:]
            self._write(slot, row)
            if sampled:
                slot.sampled_by = step.number
                samples[index] = next_token(self._read(slot))
        assert not tokens, "more tokens than rows take"
        self._samples[step.number] = samples
        return np.array(list(samples.values()), np.uint32)

    def _change(self, step: stage_pb2.Step) -> None:
        for index in unpack(step.release_slots, U32, "release_slots").tolist():
            self._live.pop(index, None)
        admissions = step.admissions
        for index, position in zip(
            unpack(admissions.slots, U32, "slots").tolist(),
            unpack(admissions.positions, U32, "positions").tolist(),
            strict=True,
        ):
            assert index < self._limits.max_slots
            assert index not in self._live, f"slot {index} was given away while it is held"
            self._live[index] = _Slot(position)
        held = {block for slot in self._live.values() for block in slot.blocks}
        for index, block in zip(
            unpack(step.append_slots, U32, "append_slots").tolist(),
            unpack(step.append_blocks, U32, "append_blocks").tolist(),
            strict=True,
        ):
            assert block < self._limits.num_blocks
            slot = self._live[index]
            # Only a block that a slot will not write, as its position is past it, may have other owners.
            shared = (len(slot.blocks) + 1) * self._limits.block_size <= slot.position
            assert shared or block not in held, f"block {block} has two owners"
            held.add(block)
            slot.blocks.append(block)

    def _rows(self, step: stage_pb2.Step) -> tuple[list[int], list[int], list[int], list[int], list[bool]]:
        if step.WhichOneof("work") == "same_rows_as":
            slots = list(self._samples[step.same_rows_as])
            count = len(slots)
            return slots, [1] * count, [step.same_rows_as] * count, [], [True] * count
        rows = step.rows
        slots = unpack(rows.slots, U32, "slots").tolist()
        count = len(slots)
        counts = unpack(rows.counts, U32, "counts", count).tolist() if rows.counts else [1] * count
        inputs = unpack(rows.input_steps, U64, "inputs", count).tolist() if rows.input_steps else [0] * count
        sample = (
            unpack(rows.sample, U8, "sample", count).astype(bool).tolist() if rows.sample else [True] * count
        )
        return slots, counts, inputs, unpack(rows.tokens, U32, "tokens").tolist(), sample

    def _cell(self, slot: _Slot, position: int) -> int:
        size = self._limits.block_size
        assert position // size < len(slot.blocks), "a position without a block"
        return slot.blocks[position // size] * size + position % size

    def _write(self, slot: _Slot, tokens: list[int]) -> None:
        for token in tokens:
            self._cells[self._cell(slot, slot.position)] = token
            slot.position += 1

    def _read(self, slot: _Slot) -> list[int]:
        return [int(self._cells[self._cell(slot, position)]) for position in range(slot.position)]
