"""The worker's loop: take a message, then run every step that can run.

What a worker does is a function of the order of its messages alone (see local_queue), so the ranks of a
group stay in step through lanes that open, break and open again, without talking about it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time

import numpy as np
import numpy.typing as npt
import zmq

from stagemesh.stage.engine.interface import Engine
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.stage.local_queue import StepTiming, TensorHeader, ToLeader, ToWorker
from stagemesh.stage.worker.lane import WorkerLane
from stagemesh.v1 import stage_pb2
from stagemesh.wire import frame
from stagemesh.wire.columns import F32, U32, U64, pack
from stagemesh.wire.errors import StagemeshError

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Worker:
    """One rank.

    Args:
        rank: Of the group; rank 0 speaks for all to the leader.
        engine: Computes the steps.
        inbox: PULL socket from the leader.
        outbox: PUSH socket to the leader.
        block_size: Tokens of a KV block.
        max_context: Tokens of a sequence at most.
    """

    def __init__(
        self,
        rank: int,
        engine: Engine,
        inbox: zmq.Socket[bytes],
        outbox: zmq.Socket[bytes],
        *,
        block_size: int,
        max_context: int,
    ) -> None:
        self._rank = rank
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._block_size = block_size
        self._max_blocks = -(-max_context // block_size)
        self._lane: WorkerLane | None = None
        self._idle_since_ns = time.monotonic_ns()
        self._waiting = ""

    def serve(self) -> None:
        """Run until the leader says stop."""
        facts = dataclasses.asdict(self._engine.facts())
        self._outbox.send_multipart([ToLeader.READY, json.dumps(facts).encode()])
        while True:
            kind, *parts = self._inbox.recv_multipart(copy=False)
            if kind.bytes == ToWorker.STOP:
                return
            try:
                self._handle(ToWorker(kind.bytes), parts)
                self._run_ready()
            except StagemeshError as error:
                self._refuse(error)

    def _handle(self, kind: ToWorker, parts: list[zmq.Frame]) -> None:
        if kind is ToWorker.STEPS:
            self._take_steps(int.from_bytes(parts[0].bytes, "little"), parts[1].bytes)
        elif kind is ToWorker.FRAME:
            part = frame.decode(parts[1].buffer)
            if self._lane and part.epoch == self._lane.request.epoch:
                self._lane.take_frame(part, int.from_bytes(parts[0].bytes, "little"))
        elif kind is ToWorker.OPEN:
            self._open(stage_pb2.OpenLaneRequest.FromString(parts[0].bytes))
        elif kind is ToWorker.PING:
            self._outbox.send_multipart([ToLeader.PONG, pack([self._rank], U64) + parts[0].bytes])

    def _open(self, request: stage_pb2.OpenLaneRequest) -> None:
        slots = SlotTable(
            max_slots=request.max_slots,
            max_blocks=self._max_blocks,
            block_size=self._block_size,
            num_blocks=request.num_blocks,
        )
        self._lane = WorkerLane(request, slots)

    def _take_steps(self, arrival_ns: int, data: bytes) -> None:
        for step in stage_pb2.ExecuteRequest.FromString(data).steps:
            if self._lane and step.epoch == self._lane.request.epoch:
                self._lane.add(step, arrival_ns)

    def _run_ready(self) -> None:
        lane = self._lane
        while lane and lane.advance():
            missing = lane.missing()
            self._say_waiting(missing)
            if missing:
                return
            self._run_step(lane)

    def _run_step(self, lane: WorkerLane) -> None:
        first_ns, arrived_ns = lane.arrived_ns()
        pending, batch, hidden = lane.take_head()
        lane.slots.begin(batch)
        began_ns = time.monotonic_ns()
        tokens = lane.slots.input_tokens(batch) if lane.first else None
        output = self._engine.run(
            batch,
            arrived_ns=arrived_ns,
            tokens=tokens,
            hidden=hidden,
            debug_logits=lane.request.debug_logits,
        )
        computed_ns = time.monotonic_ns()
        if lane.first and lane.last:
            assert output.tokens is not None
            lane.take_tokens(batch.number, output.tokens)
        sent_bytes = 0
        if self._rank == 0:
            if output.tokens is not None:
                sent_bytes = self._send_result(lane, batch.number, output.tokens, output.logits)
            elif output.hidden is not None:
                sent_bytes = self._send_tensor(
                    lane, stage_pb2.LINK_KIND_ACTIVATIONS, batch.number, output.hidden
                )
            sent_ns = time.monotonic_ns()
            free_ns = max(self._idle_since_ns, pending.arrival_ns)
            input_ns = max(free_ns, first_ns)
            timing = StepTiming(
                epoch=lane.request.epoch,
                number=batch.number,
                arrival_ns=pending.arrival_ns,
                queue_ns=free_ns - pending.arrival_ns,
                wait_ns=input_ns - free_ns,
                receive_ns=began_ns - input_ns,
                compute_ns=computed_ns - began_ns,
                send_ns=sent_ns - computed_ns,
                sent_bytes=sent_bytes,
            )
            self._outbox.send_multipart([ToLeader.DONE, timing.pack()])
        self._idle_since_ns = time.monotonic_ns()

    def _send_result(self, lane: WorkerLane, number: int, tokens: IntArray, logits: FloatArray | None) -> int:
        column = pack(tokens, U32)
        sent = 0
        if not lane.first:  # the ring goes first: stage 0 waits for it, the router does not
            sent = self._send_tensor(lane, stage_pb2.LINK_KIND_RING, number, memoryview(column))
        result = stage_pb2.StepResult(epoch=lane.request.epoch, number=number, token_ids=column)
        if logits is not None:
            result.logits = pack(logits, F32)
        response = stage_pb2.ExecuteResponse(results=[result])
        self._outbox.send_multipart([ToLeader.RESULT, response.SerializeToString()])
        return sent

    def _send_tensor(self, lane: WorkerLane, kind: int, number: int, data: memoryview) -> int:
        header = TensorHeader(lane.request.epoch, kind, number)
        self._outbox.send_multipart([ToLeader.TENSOR, header.pack(), data], copy=False)
        return len(data)

    def _say_waiting(self, what: str) -> None:
        if what != self._waiting and self._rank == 0:
            self._outbox.send_multipart([ToLeader.WAITING, what.encode()])
        self._waiting = what

    def _refuse(self, error: StagemeshError) -> None:
        """A step or frame broke the contract: the lane is dropped, the leader tells the router."""
        log.error("%s", error)
        epoch = self._lane.request.epoch if self._lane else 0
        self._lane = None
        if self._rank == 0:
            self._outbox.send_multipart([ToLeader.REFUSED, pack([epoch], U64), str(error).encode()])
