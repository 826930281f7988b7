"""A step as the scheduler made it, its wire form, and the record its result is matched against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import F32, U8, U32, U64, pack

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class Changes:
    """What a step changes on the stages before its rows run."""

    released: list[int] = field(default_factory=list)
    """Slots."""
    admitted: list[Sequence] = field(default_factory=list)
    append_slots: list[int] = field(default_factory=list)
    append_blocks: list[int] = field(default_factory=list)
    """A block for each of `append_slots`."""

    def append(self, slots: Iterable[int], blocks: list[int]) -> None:
        """One more block for each of these slots."""
        self.append_slots += slots
        self.append_blocks += blocks

    def release(self, slots: list[int]) -> None:
        """Their sequences leave; what the stages have not heard of yet, they never will."""
        left = set(slots)
        if self.admitted:
            self.admitted = [sequence for sequence in self.admitted if sequence.slot not in left]
        if not left.isdisjoint(self.append_slots):
            pairs = zip(self.append_slots, self.append_blocks, strict=True)
            kept = [(slot, block) for slot, block in pairs if slot not in left]
            self.append_slots = [slot for slot, _ in kept]
            self.append_blocks = [block for _, block in kept]
        self.released += slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One microbatch. Rows are decodes first, then prefill chunks; all columns have a row each."""

    number: int
    changes: Changes
    slots: Int64
    counts: Int64
    input_steps: npt.NDArray[np.uint64]
    """The step whose sample is the row's input; 0: its tokens are given."""
    tokens: list[npt.NDArray[np.uint32]]
    """Of the rows with input step 0."""
    sample: npt.NDArray[np.bool_]
    sequences: npt.NDArray[np.object_]
    """Who each row belongs to: `Sequence`s. The result finds its sequences here, never by slot."""
    tenancies: Int64
    """Whose slot it was when the step was made: a row is its slot's only while these agree."""
    num_decodes: int
    """Rows whose input comes from an earlier step."""
    newest_input: int
    """The latest of those steps; 0 if there is none."""
    same_rows_as: int = 0
    """Above 0: the rows are those that step sampled."""

    @property
    def sampled_slots(self) -> Int64:
        """Of the sampled rows, in row order; all are where no prompt is computed."""
        return self.slots[self.sample] if self.tokens else self.slots

    @property
    def num_tokens(self) -> int:
        """Positions computed."""
        return int(self.counts.sum()) if self.tokens else len(self.slots)


def encode(step: Step, epoch: int, traceparent: str = "") -> stage_pb2.Step:
    """The step on the wire; `traceparent` is of its own trace."""
    message = stage_pb2.Step()
    encode_into(message, step, epoch, traceparent)
    return message


def encode_into(message: stage_pb2.Step, step: Step, epoch: int, traceparent: str = "") -> None:
    """The same into an empty message, which may be part of another."""
    message.epoch, message.number = epoch, step.number
    if traceparent:
        message.traceparent = traceparent
    changes = step.changes
    if changes.released:
        message.release_slots = pack(changes.released, U32)
    if changes.admitted:
        message.admissions.CopyFrom(_admissions(changes.admitted))
    if changes.append_slots:
        message.append_slots = pack(changes.append_slots, U32)
        message.append_blocks = pack(changes.append_blocks, U32)
    if step.same_rows_as:
        message.same_rows_as = step.same_rows_as
        return
    rows = message.rows
    rows.slots = pack(step.slots, U32)
    if step.newest_input:
        rows.input_steps = pack(step.input_steps, U64)
    if not step.tokens:
        return
    if (step.counts != 1).any():
        rows.counts = pack(step.counts, U32)
    rows.tokens = pack(np.concatenate(step.tokens), U32)
    if not step.sample.all():
        rows.sample = pack(step.sample, U8)


def _admissions(admitted: list[Sequence]) -> stage_pb2.Admissions:
    sampling = [sequence.request.sampling for sequence in admitted]
    return stage_pb2.Admissions(
        slots=pack([sequence.slot for sequence in admitted], U32),
        positions=pack([sequence.first_position for sequence in admitted], U32),
        seeds=pack([one.seed for one in sampling], U64),
        temperatures=pack([one.temperature for one in sampling], F32),
        top_ks=pack([one.top_k for one in sampling], U32),
        top_ps=pack([one.top_p for one in sampling], F32),
    )
