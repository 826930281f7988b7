"""The contract of an engine: what computes the steps of one rank."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stagemesh.stage.engine.batch import Batch
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import StageLostError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What a rank holds, for Describe and the load line; plain values that cross the local queue as JSON."""

    rank: int
    device: str
    num_heads: int
    num_kv_heads: int
    mlp_columns: int
    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    process_id: int
    load_seconds: dict[str, float] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    """What computes and why, such as attention: "flashinfer 0.6.12"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a step takes besides its batch."""

    arrived_ns: int
    """Monotonic time at which all the step needs had come to the host."""
    tokens: npt.NDArray[np.int64] | None = None
    """[T] input ids, on the first stage; -1 - slot: the last token sampled for the slot, which the engine has."""
    hidden: memoryview | None = None
    """Bytes of [T, hidden_size] from the stage before; None on the first stage and where a link of the engine's
    own brings them."""
    debug_logits: bool = False
    """Return the logits of the sampled rows too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a step left behind; host memory that nobody writes again."""

    hidden: memoryview | None = None
    """Bytes of [T, hidden_size] in the stage's dtype, for the next stage; None on the last, and where a link of
    the engine's own took them."""
    tokens: npt.NDArray[np.int64] | None = None
    """[S] sampled token ids, on the last stage."""
    logits: npt.NDArray[np.float32] | None = None
    """[S, vocab_size] if the lane asks for them (debug)."""
    compute_ns: int = 0
    """Spent computing; a device measures it itself."""
    wait_ns: int = 0
    """Of a device: spent waiting for a link, while it had nothing else to do."""
    receive_ns: int = 0
    """Of a device: spent taking what was there."""
    sent_bytes: int = 0
    """Activation bytes that a link of the engine's own took."""


class StepHandle(Protocol):
    """A step that was launched."""

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""

    def wait(self) -> StepOutput:
        """Block until the step's output is in host memory; may be called from another thread."""


@dataclass(frozen=True, slots=True)
class CompleteStep:
    """The handle of a step that was computed when it was launched."""

    output: StepOutput

    @property
    def done(self) -> bool:
        return True

    def wait(self) -> StepOutput:
        return self.output


class EngineLinks(Protocol):
    """Links of an engine's own, from device to device; calls but `launch`'s may come from any thread."""

    sends_hidden: bool
    receives_hidden: bool
    sends_ring: bool
    receives_ring: bool

    def prepare(self, kind: int) -> bytes:
        """Mint the id of this rank's end of a link that it receives on."""

    def connect(self, request: stage_pb2.ConnectLinkRequest) -> None:
        """Open a link; returns when dummy data has passed both ways."""

    def check(self) -> str:
        """What is wrong with a link, for people; empty if nothing is known to be."""

    def failure(self) -> str:
        """Why a step that was launched has no inputs or went nowhere, for people; empty if none did. Asked at every result."""

    def abort(self) -> None:
        """Break off every link; whoever waits in one goes on."""


class NoLinks:
    """Of an engine whose inputs and outputs go through the host."""

    sends_hidden = receives_hidden = sends_ring = receives_ring = False

    def prepare(self, kind: int) -> bytes:
        """There is none."""
        raise StageLostError("this rank has no links of its own", reason="TRANSPORT_UNKNOWN")

    def connect(self, request: stage_pb2.ConnectLinkRequest) -> None:
        """There is none."""
        raise StageLostError("this rank has no links of its own", reason="TRANSPORT_UNKNOWN")

    def check(self) -> str:
        """Nothing is."""
        return ""

    def failure(self) -> str:
        """There is none."""
        return ""

    def abort(self) -> None:
        """There is nothing to."""


class Engine(Protocol):
    """Computes steps in order. It holds weights and KV; the slots are the worker's."""

    @property
    def links(self) -> EngineLinks:
        """Its own; a link it has not goes through the leader."""

    @property
    def holds_tokens(self) -> bool:
        """Whether the tokens it samples stay with it, as inputs of later steps of the same engine."""

    def facts(self) -> RankFacts:
        """What this rank holds."""

    def open(self, lane: stage_pb2.OpenLaneRequest) -> None:
        """A new epoch: whatever was under way is dropped, whatever a lane needs is allocated."""

    def launch(self, batch: Batch, inputs: StepInputs) -> StepHandle:
        """Start one step; steps are computed in the order of the calls."""


class HostEngine(ABC):
    """An engine that computes in the calling thread and is done when it returns."""

    holds_tokens = False
    links = NoLinks()

    def open(self, lane: stage_pb2.OpenLaneRequest) -> None:  # noqa: B027 - most have nothing to do
        """Nothing of an epoch is left in such an engine."""

    def launch(self, batch: Batch, inputs: StepInputs) -> StepHandle:
        """Compute the step."""
        began_ns = time.monotonic_ns()
        output = self.run(
            batch,
            arrived_ns=inputs.arrived_ns,
            tokens=inputs.tokens,
            hidden=inputs.hidden,
            debug_logits=inputs.debug_logits,
        )
        return CompleteStep(replace(output, compute_ns=time.monotonic_ns() - began_ns))

    @abstractmethod
    def run(
        self,
        batch: Batch,
        *,
        arrived_ns: int,
        tokens: npt.NDArray[np.int64] | None,
        hidden: memoryview | None,
        debug_logits: bool,
    ) -> StepOutput:
        """Compute the step; the arguments are those of StepInputs."""
