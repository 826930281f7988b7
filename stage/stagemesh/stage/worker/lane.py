"""A worker's view of the lane it serves: steps waiting, inputs that have come, slots."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U32
from stagemesh.wire.errors import InvalidArgumentError
from stagemesh.wire.frame import Frame

ARRIVALS_KEPT = 64
"""Steps back: a later step may still take the tokens of one that long past."""


@dataclass(slots=True)
class _Assembly:
    """A tensor of several frames on its way in."""

    data: bytearray
    filled: int = 0


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that has come and has not run."""

    step: stage_pb2.Step
    arrival_ns: int


@dataclass(slots=True)
class WorkerLane:
    """Everything of one epoch. A new epoch makes a new one and the old is dropped whole.

    The head step is applied to the slots as soon as it is the head (its changes come before its inputs),
    so `head` is the batch that runs next.
    """

    request: stage_pb2.OpenLaneRequest
    slots: SlotTable
    held_tokens: bool = False
    """Sampled tokens reach this stage's engine without passing the host."""
    linked_hidden: bool = False
    """So do the activations."""
    pending: deque[PendingStep] = field(default_factory=deque)
    head: Batch | None = None
    next_number: int = 1
    over: bool = False
    """A link of it broke. Its steps are launched all the same, as other ranks launch them; their results are nobody's."""
    ended: str = ""
    """The link that brings its inputs has ended, for people."""
    _hidden: dict[int, memoryview] = field(default_factory=dict)
    _arrivals: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """Monotonic ns at which the tensor of (kind, step) began to come, and at which it was complete."""
    _assemblies: dict[tuple[int, int], _Assembly] = field(default_factory=dict)
    _ring_step: int = 0
    """The last step whose tokens came back."""

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self.request.stage_index == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.request.stage_index == self.request.num_stages - 1

    def add(self, step: stage_pb2.Step, arrival_ns: int) -> None:
        """Queue a step; numbers are consecutive, since links match by order."""
        if step.number != self.next_number:
            raise InvalidArgumentError(
                f"step {step.number} came, expected step {self.next_number}: steps are consecutive",
                field="steps.number",
            )
        self.next_number += 1
        self.pending.append(PendingStep(step, arrival_ns))

    def take_frame(self, frame: Frame, arrival_ns: int) -> None:
        """Keep what a neighbour sent. A tensor of one frame is used in place."""
        if frame.step == 0:  # the dummy that opened the link
            return
        key = (frame.kind, frame.step)
        self._arrivals[key] = (self._arrivals.get(key, (arrival_ns, 0))[0], arrival_ns)
        if frame.offset == 0 and frame.last:
            self._complete(frame.kind, frame.step, frame.data)
            return
        assembly = self._assemblies.setdefault(key, _Assembly(bytearray(frame.total_bytes)))
        assembly.data[frame.offset : frame.offset + len(frame.data)] = frame.data
        assembly.filled += len(frame.data)
        if assembly.filled == len(assembly.data):
            del self._assemblies[key]
            self._complete(frame.kind, frame.step, memoryview(assembly.data))

    def take_tensor(self, kind: int, step: int, data: memoryview, first_ns: int, last_ns: int) -> None:
        """Keep a whole tensor that a unix link brought."""
        self._arrivals[kind, step] = (first_ns, last_ns)
        self._complete(kind, step, data)

    def take_tokens(self, number: int, tokens: np.ndarray) -> None:
        """The tokens step `number` sampled, in order of steps."""
        self.slots.deliver(number, tokens)
        self._ring_step = number

    def advance(self) -> bool:
        """Make the next step the head; False if none has come."""
        if self.head is None and self.pending:
            self.head = self.slots.apply(self.pending[0].step)
        return self.head is not None

    def missing(self) -> str:
        """What the head still needs, for people; empty when it can run."""
        assert self.head is not None
        number = self.head.number
        if not self.first:
            return (
                ""
                if self.linked_hidden or number in self._hidden
                else self._waits(f"activations of step {number} from stage {self.request.stage_index - 1}")
            )
        if not self.held_tokens and self.head.newest_input > self._ring_step:
            return self._waits(
                f"tokens of step {self.head.newest_input} from stage {self.request.num_stages - 1}"
            )
        return ""

    def _waits(self, what: str) -> str:
        return f"{what}, but {self.ended}" if self.ended else what

    def arrived_ns(self) -> tuple[int, int]:
        """When the head and the first of what it needs were there, and when all of it was."""
        assert self.head is not None
        if self.first:
            key = (stage_pb2.LINK_KIND_RING, self.head.newest_input)
        else:
            key = (stage_pb2.LINK_KIND_ACTIVATIONS, self.head.number)
        first_ns, last_ns = self._arrivals.get(key, (0, 0))
        step_ns = self.pending[0].arrival_ns
        return max(step_ns, first_ns), max(step_ns, last_ns)

    def take_head(self) -> tuple[PendingStep, Batch, memoryview | None]:
        """The step to run now, its batch, and its activations (None on the first stage)."""
        batch = self.head
        assert batch is not None
        self.head = None
        self._arrivals = {
            key: at for key, at in self._arrivals.items() if key[1] > batch.number - ARRIVALS_KEPT
        }
        return self.pending.popleft(), batch, self._hidden.pop(batch.number, None)

    def _complete(self, kind: int, step: int, data: memoryview) -> None:
        if kind == stage_pb2.LINK_KIND_RING:
            self.take_tokens(step, np.frombuffer(data, U32).astype(np.int64))
        else:
            self._hidden[step] = data
