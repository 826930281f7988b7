"""A mesh in one process, without gRPC: the real scheduler, wire form, workers, slots and engines.

What is not real: processes, links and clocks. Hidden states and ring tokens travel as the bytes of frames.
Which stage gets to work when is drawn from a seed, so that steps, activations and ring tokens arrive in
many orders, and every run can be repeated.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from stage_for_tests import LocalStage

from stagemesh.model.source import ModelSource
from stagemesh.model.split import split_layers
from stagemesh.router.scheduler import Limits, Request, Scheduler, Step
from stagemesh.router.scheduler.step import encode
from stagemesh.stage.local_queue import TensorHeader, ToLeader, ToWorker
from stagemesh.v1 import stage_pb2
from stagemesh.wire import frame
from stagemesh.wire.columns import F32, U32, pack, unpack

UNLIMITED = 1 << 20
LONG_AGO = bytes(8)
"""When a message reached the leader, for timings that nothing here looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """How a lane is driven."""

    lookahead: int = 1
    step_tokens: int = UNLIMITED
    num_blocks: int = 0
    """Of the lane; 0: all the engines have."""
    num_microbatches: int = 0
    """0: one for each stage."""
    depth: int = 0
    """0: as the router chooses it."""
    held_results: int = UNLIMITED
    """Results stay on their way while there are no more than this many, as long as a step can be made: by
    default steps are in flight as deep as the scheduler goes, with 0 there is one at a time."""
    prefix_cache: bool = True
    permute_blocks: bool = False
    """The stages see other block ids than the scheduler handed out."""
    seed: int = 0
    """Of the order in which stages get to work."""


@dataclass(slots=True)
class Answer:
    """What came back for a request."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)
    num_preemptions: int = 0


@dataclass(slots=True)
class Run:
    """A finished run: the answers, and the steps that made them."""

    answers: dict[str, Answer] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    scheduler: Scheduler = field(init=False)

    def submit(self, request: Request) -> None:
        """Also while it runs, from the hook."""
        self.scheduler.submit(request, 0.0)
        self.answers[request.request_id] = Answer(request)


class LocalMesh:
    """Stages of one model. Runs follow each other on the same engines, each with an epoch of its own.

    Args:
        source: The model.
        tps: Ranks of each stage.
        num_blocks: KV blocks of the engines.
        block_size: Tokens of a block.
        max_context: Tokens of a sequence at most.
    """

    def __init__(
        self,
        source: ModelSource,
        tps: Sequence[int],
        *,
        num_blocks: int = 320,
        block_size: int = 8,
        max_context: int = 160,
    ) -> None:
        self.source = source
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_context = max_context
        self._epoch = 0
        self.stages = [
            LocalStage(
                source, layers, tp, num_blocks=num_blocks, block_size=block_size, max_context=max_context
            )
            for layers, tp in zip(split_layers(source.config, len(tps)), tps, strict=True)
        ]

    def run(
        self,
        requests: Sequence[Request],
        drive: Drive | None = None,
        *,
        after_result: Callable[[Run], None] = lambda run: None,
    ) -> Run:
        """Answer the requests, all submitted at once; `after_result` may submit and abort more."""
        drive = drive or Drive()
        self._epoch += 1
        return _Runner(self.stages, self._limits(drive, len(requests)), drive, self._epoch, after_result).run(
            requests
        )

    def close(self) -> None:
        """End the stages' threads."""
        for stage in self.stages:
            stage.close()

    def _limits(self, drive: Drive, num_requests: int) -> Limits:
        microbatches = drive.num_microbatches or len(self.stages)
        return Limits(
            num_blocks=drive.num_blocks or self._num_blocks,
            block_size=self._block_size,
            max_slots=num_requests + 2,
            max_blocks=-(-self._max_context // self._block_size),
            max_waiting=1024,
            step_tokens=drive.step_tokens,
            num_microbatches=microbatches,
            depth=drive.depth or microbatches + (1 if drive.lookahead else 0),
            lookahead=drive.lookahead,
            prefix_cache=drive.prefix_cache,
        )


class _Runner:
    """One run: the router's lane and the stages' leaders."""

    def __init__(
        self,
        stages: list[LocalStage],
        limits: Limits,
        drive: Drive,
        epoch: int,
        after_result: Callable[[Run], None],
    ) -> None:
        self._stages = stages
        self._drive = drive
        self._epoch = epoch
        self._after_result = after_result
        self._random = random.Random(drive.seed)
        self._results: deque[stage_pb2.StepResult] = deque()
        self._sent: dict[int, Step] = {}
        self._waiting = [""] * len(stages)
        self._run = Run()
        self._run.scheduler = Scheduler(limits)
        ids = list(range(limits.num_blocks))
        if drive.permute_blocks:
            self._random.shuffle(ids)
        self._block_ids = np.array(ids, np.uint32)
        for index, stage in enumerate(stages):
            stage.poison()
            lane = stage_pb2.OpenLaneRequest(
                epoch=epoch,
                stage_index=index,
                num_stages=len(stages),
                num_blocks=limits.num_blocks,
                max_slots=limits.max_slots,
                depth=limits.depth,
                debug_logits=True,
            )
            stage.send(ToWorker.OPEN, lane.SerializeToString())

    def run(self, requests: Sequence[Request]) -> Run:
        scheduler = self._run.scheduler
        for request in requests:
            self._run.submit(request)
        while scheduler.live:
            step = scheduler.next_step(0.0)
            if step:
                self._send(step)
                self._pump(self._random.randrange(len(self._stages)))
            if scheduler.num_in_flight and (not step or scheduler.num_in_flight > self._drive.held_results):
                self._take_result()
            elif not step:
                raise AssertionError(f"nothing in flight and no step for {len(scheduler.live)} requests")
        while scheduler.num_in_flight:  # rows nobody waits for: the stages run them all the same
            self._take_result()
        assert scheduler.pool.num_free == scheduler.limits.num_blocks, "blocks were lost"
        return self._run

    def _send(self, step: Step) -> None:
        message = encode(step, self._epoch)
        if self._drive.permute_blocks and message.append_blocks:
            message.append_blocks = pack(
                self._block_ids[unpack(message.append_blocks, U32, "append_blocks")], U32
            )
        data = stage_pb2.ExecuteRequest(steps=[message]).SerializeToString()
        self._sent[step.number] = step
        self._run.steps.append(step)
        for stage in self._stages:
            stage.send(ToWorker.STEPS, LONG_AGO, data)

    def _take_result(self) -> None:
        while not self._results:
            order = self._random.sample(range(len(self._stages)), len(self._stages))
            busy = [self._pump(index) for index in order]
            if not any(busy):
                raise AssertionError(f"no stage can go on; they wait for {self._waiting}")
        result = self._results.popleft()
        step = self._sent.pop(result.number)
        sampled = np.flatnonzero(step.sample)
        logits = unpack(result.logits, F32, "logits").reshape(len(sampled), -1) if len(sampled) else []
        for row, values in zip(sampled, logits, strict=True):
            sequence = step.sequences[row]
            if sequence.finish is None:
                self._run.answers[sequence.request.request_id].logits.append(values)
        for sequence in step.sequences:
            self._run.answers[sequence.request.request_id].num_preemptions = sequence.num_preemptions
        for delta in self._run.scheduler.take_result(
            result.number, unpack(result.token_ids, U32, "token_ids"), 0.0
        ):
            self._run.answers[delta.request.request_id].token_ids += delta.token_ids
        self._after_result(self._run)

    def _pump(self, index: int) -> bool:
        """Let a stage work; whether it had anything to look at."""
        busy = len(self._stages[index].inboxes[0]) > 0
        for kind, *parts in self._stages[index].pump():
            if kind == ToLeader.TENSOR:
                self._forward(index, TensorHeader.unpack(parts[0]), parts[1])
            elif kind == ToLeader.RESULT:
                self._results += stage_pb2.ExecuteResponse.FromString(parts[0]).results
            elif kind == ToLeader.WAITING:
                self._waiting[index] = parts[0].decode()
            elif kind == ToLeader.REFUSED:
                raise AssertionError(f"stage {index} refused: {parts[1].decode()}")
        return busy

    def _forward(self, index: int, header: TensorHeader, data: bytes) -> None:
        ring = header.kind == stage_pb2.LINK_KIND_RING
        target = self._stages[0 if ring else index + 1]
        for part in frame.encode(
            epoch=header.epoch, kind=header.kind, step=header.step, tensor=memoryview(data)
        ):
            target.send(ToWorker.FRAME, LONG_AGO, part)
