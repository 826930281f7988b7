"""The worker's loop: take a message, then run every step that can run.

What a worker does is a function of the order of its messages alone (see local_queue), so the ranks of a
group stay in step through lanes that open, break and open again, without talking about it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import threading
import time

import numpy as np
import numpy.typing as npt

from stagemesh.stage.engine.interface import Engine, StepInputs
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.stage.link_name import link_name
from stagemesh.stage.local_queue import StepTiming, TensorHeader, ToLeader, ToWorker
from stagemesh.stage.local_socket import Inbox, Outbox, Part
from stagemesh.stage.unix_link import unpack_times
from stagemesh.stage.worker.lane import WorkerLane
from stagemesh.stage.worker.links import LinkEnds
from stagemesh.stage.worker.results import LaunchedStep, ResultThread
from stagemesh.stage.worker.watchdog import Watchdog
from stagemesh.v1 import stage_pb2
from stagemesh.wire import frame
from stagemesh.wire.columns import F32, U32, U64, pack, unpack
from stagemesh.wire.errors import StageLostError, StagemeshError

log = logging.getLogger(__name__)

DEVICE_FAILED = 3
"""Exit code of a worker whose device failed."""
IDLE_S = 0.05
"""With nothing to do for so long, rank 0 says what it waits for and where the time went."""
TIMINGS_HELD = 16
"""Steps whose timings go to the leader as one message."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Worker:
    """One rank.

    Args:
        rank: Of the group; rank 0 speaks for all to the leader.
        engine: Computes the steps.
        inbox: Messages from the leader.
        outbox: Messages to the leader.
        block_size: Tokens of a KV block.
        max_context: Tokens of a sequence at most.
        step_timeout_s: A step that a device has not finished after that is given up, with the links it may wait in.
        reports: Say where the time of steps went, as rank 0 always does.
    """

    def __init__(
        self,
        rank: int,
        engine: Engine,
        inbox: Inbox,
        outbox: Outbox,
        *,
        block_size: int,
        max_context: int,
        step_timeout_s: float = 60.0,
        reports: bool = False,
    ) -> None:
        self._rank = rank
        self._reports = reports or rank == 0
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._block_size = block_size
        self._max_blocks = -(-max_context // block_size)
        self._lane: WorkerLane | None = None
        self._idle_since_ns = time.monotonic_ns()
        self._waiting = ""
        self._timing = threading.Lock()
        self._results = ResultThread(self._finish, self._fail)
        self._said_waiting = ""
        self._timings: list[bytes] = []
        self._timings_said_ns = 0
        self._watchdog = Watchdog(self._results, engine.links, step_timeout_s, self._break)
        self._links = LinkEnds(inbox, step_timeout_s, self._lose_link)

    def serve(self) -> None:
        """Run until the leader says stop."""
        # What loading left is there to stay: a full collection over it takes 10 ms, in the middle of some step.
        gc.collect()
        gc.freeze()
        facts = dataclasses.asdict(self._engine.facts())
        self._say(ToLeader.READY, json.dumps(facts).encode())
        while True:
            # What the leader need not hear at once waits until there is nothing else to do.
            message = self._inbox.recv_multipart(IDLE_S if self._unsaid else None)
            if message is None:
                self._say_rest()
                continue
            kind, *parts = message
            if kind.bytes == ToWorker.STOP:
                self._watchdog.stop()
                self._results.stop()
                return
            try:
                self._handle(ToWorker(kind.bytes), parts)
                self._run_ready()
            except StageLostError as error:
                self._break(str(error), error.stage)
            except StagemeshError as error:
                self._refuse(error, self._lane.request.epoch if self._lane else 0)

    def _handle(self, kind: ToWorker, parts: list[Part]) -> None:
        if kind is ToWorker.TENSOR:
            header = TensorHeader.unpack(parts[1].buffer)
            if self._lane and header.epoch == self._lane.request.epoch:
                self._lane.take_tensor(
                    header.kind, header.step, parts[2].buffer, *unpack_times(parts[0].buffer)
                )
        elif kind is ToWorker.STEPS:
            self._take_steps(int.from_bytes(parts[0].bytes, "little"), parts[1].bytes)
        elif kind is ToWorker.FRAME:
            part = frame.decode(parts[1].buffer)
            if self._lane and part.epoch == self._lane.request.epoch:
                self._lane.take_frame(part, int.from_bytes(parts[0].bytes, "little"))
        elif kind is ToWorker.OPEN:
            self._open(stage_pb2.OpenLaneRequest.FromString(parts[0].bytes))
        elif kind is ToWorker.PREPARE:
            self._prepare(*unpack(parts[0].bytes, U64, "prepare", 2).tolist())
        elif kind is ToWorker.CONNECT:
            request = stage_pb2.ConnectLinkRequest.FromString(parts[0].bytes)
            threading.Thread(target=self._connect, args=(request,), name="connect", daemon=True).start()
        elif kind is ToWorker.LINK:
            self._links.take(self._inbox.take_end(), parts)
        elif kind is ToWorker.ENDED:
            epoch, link = unpack(parts[0].bytes, U64, "ended", 2).tolist()
            self._links.ended(epoch, link)
            if self._lane and self._lane.request.epoch == epoch:
                self._lane.ended = f"the {link_name(link)} link to this stage has ended"
        elif kind is ToWorker.CLOSE:
            self._links.close_senders(int.from_bytes(parts[0].bytes, "little"))
        elif kind is ToWorker.PING:
            self._say(ToLeader.PONG, pack([self._rank], U64) + parts[0].bytes)

    def _open(self, request: stage_pb2.OpenLaneRequest) -> None:
        slots = SlotTable(
            max_slots=request.max_slots,
            max_blocks=self._max_blocks,
            block_size=self._block_size,
            num_blocks=request.num_blocks,
        )
        # In this order: a result that completes from here on finds that its lane is not the worker's any more.
        self._lane = None
        self._links.close()
        try:
            self._engine.open(request)
        except StagemeshError as error:
            self._refuse(error, request.epoch)
            return
        with self._timing:
            self._timings.clear()
        lane = WorkerLane(request, slots)
        lane.held_tokens = lane.first and lane.last and self._engine.holds_tokens
        self._lane = lane

    def _prepare(self, epoch: int, kind: int) -> None:
        minted = self._engine.links.prepare(kind)
        self._say(ToLeader.PREPARED, pack([self._rank, epoch, kind], U64), minted)

    def _connect(self, request: stage_pb2.ConnectLinkRequest) -> None:
        """Open a link of the engine's own, off the thread that must go on answering."""
        problem = ""
        try:
            self._engine.links.connect(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the router must hear of it
            problem = f"{type(error).__name__}: {error}"
        lane = self._lane
        if not problem and lane and lane.request.epoch == request.epoch:
            if request.kind == stage_pb2.LINK_KIND_RING:
                lane.held_tokens = lane.held_tokens or not request.sender
            else:
                lane.linked_hidden = lane.linked_hidden or not request.sender
        where = pack([self._rank, request.epoch, request.kind, request.sender], U64)
        self._say(ToLeader.CONNECTED, where, problem.encode())

    def _break(self, what: str, blamed: str = "") -> None:
        """A link failed, or a step hangs in one: the lane is over (rule 8)."""
        lane = self._lane
        if lane is None or lane.over:
            return
        lane.over = True
        log.error("%s", what)
        self._engine.links.abort()
        self._links.close_senders(lane.request.epoch)
        self._say(ToLeader.BROKEN, pack([lane.request.epoch], U64), what.encode(), blamed.encode())

    def _lose_link(self, epoch: int, what: str, peer: str) -> None:
        """A unix link ended; that of an older epoch is of no concern any more."""
        if self._lane and self._lane.request.epoch == epoch:
            self._break(what, peer)

    def _take_steps(self, arrival_ns: int, data: bytes) -> None:
        for step in stage_pb2.ExecuteRequest.FromString(data).steps:
            if self._lane and step.epoch == self._lane.request.epoch:
                self._lane.add(step, arrival_ns)

    def _run_ready(self) -> None:
        lane = self._lane
        while lane and lane.advance():
            self._waiting = lane.missing()
            if self._waiting:
                return
            if self._said_waiting:
                self._say_waiting("")
            self._run_step(lane)

    def _run_step(self, lane: WorkerLane) -> None:
        first_ns, arrived_ns = lane.arrived_ns()
        pending, batch, hidden = lane.take_head()
        lane.slots.begin(batch)
        tokens = lane.slots.input_tokens(batch, held=lane.held_tokens) if lane.first else None
        handle = self._engine.launch(
            batch,
            StepInputs(
                arrived_ns=arrived_ns,
                tokens=tokens,
                hidden=hidden,
                debug_logits=lane.request.debug_logits,
            ),
        )
        launched = LaunchedStep(lane, pending.arrival_ns, first_ns, batch.number, time.monotonic_ns(), handle)
        if handle.done:
            self._finish(launched)
        else:
            self._results.add(launched)
            self._watchdog.start()

    def _finish(self, step: LaunchedStep) -> None:
        """Send on what a step left behind. Called in order of steps; for a device's from the result thread."""
        lane, output = step.lane, step.handle.wait()
        ended_ns = time.monotonic_ns()
        # Poisoned: what completes after a link broke or the epoch was raised is nobody's.
        if lane is not self._lane or lane.over:
            return
        if failure := self._engine.links.failure():
            self._break(failure)
            return
        if lane.first and lane.last and not lane.held_tokens:
            assert output.tokens is not None
            lane.take_tokens(step.number, output.tokens)
        sent_bytes = output.sent_bytes
        if self._rank == 0:
            if output.tokens is not None:
                sent_bytes += self._send_result(lane, step.number, output.tokens, output.logits)
            elif output.hidden is not None:
                sent_bytes += self._send_tensor(
                    lane, stage_pb2.LINK_KIND_ACTIVATIONS, step.number, output.hidden
                )
        if self._reports:
            sent_ns = time.monotonic_ns()
            began_ns = ended_ns - output.compute_ns
            if step.handle.done:
                free_ns = min(max(self._idle_since_ns, step.arrival_ns), began_ns)
                input_ns = min(max(free_ns, step.first_ns), began_ns)
            else:  # a device that computes behind the host's back says itself what it waited for
                input_ns = max(began_ns - output.receive_ns, step.arrival_ns)
                free_ns = max(input_ns - output.wait_ns, step.arrival_ns)
            timing = StepTiming(
                epoch=lane.request.epoch,
                number=step.number,
                arrival_ns=step.arrival_ns,
                queue_ns=max(0, free_ns - step.arrival_ns),
                wait_ns=input_ns - free_ns,
                receive_ns=max(0, began_ns - input_ns),
                compute_ns=output.compute_ns,
                send_ns=sent_ns - ended_ns,
                sent_bytes=sent_bytes,
            )
            self._add_timing(timing)
        self._idle_since_ns = time.monotonic_ns()

    def _send_result(self, lane: WorkerLane, number: int, tokens: IntArray, logits: FloatArray | None) -> int:
        column = pack(tokens, U32)
        sent = 0
        # The ring goes first: stage 0 waits for it, the router does not.
        if not lane.first and not self._engine.links.sends_ring:
            sent = self._send_tensor(lane, stage_pb2.LINK_KIND_RING, number, memoryview(column))
        result = stage_pb2.StepResult(epoch=lane.request.epoch, number=number, token_ids=column)
        if logits is not None:
            result.logits = pack(logits, F32)
        response = stage_pb2.ExecuteResponse(results=[result])
        self._say(ToLeader.RESULT, response.SerializeToString())
        return sent

    def _send_tensor(self, lane: WorkerLane, kind: int, number: int, data: memoryview) -> int:
        if self._links.send(lane.request.epoch, kind, number, data):
            return len(data)
        header = TensorHeader(lane.request.epoch, kind, number)
        self._say(ToLeader.TENSOR, header.pack(), data)
        return len(data)

    def _say(self, kind: ToLeader, *parts: bytes | memoryview) -> None:
        self._outbox.send_multipart([kind, *parts])

    @property
    def _unsaid(self) -> bool:
        return bool(self._timings) or (self._rank == 0 and self._waiting != self._said_waiting)

    def _say_rest(self) -> None:
        self._say_timings()
        self._say_waiting(self._waiting)

    def _add_timing(self, timing: StepTiming) -> None:
        with self._timing:
            self._timings.append(timing.pack())
            old = time.monotonic_ns() - self._timings_said_ns > IDLE_S * 1e9
        if old or len(self._timings) >= TIMINGS_HELD:
            self._say_timings()

    def _say_timings(self) -> None:
        # The result thread adds timings, the launch thread says what is left when it has nothing to do.
        with self._timing:
            timings, self._timings = self._timings, []
            self._timings_said_ns = time.monotonic_ns()
        if timings:
            if self._rank == 0:
                self._say(ToLeader.DONE, b"".join(timings))
            else:
                self._say(ToLeader.RANK_DONE, pack([self._rank], U64), b"".join(timings))

    def _say_waiting(self, what: str) -> None:
        if what != self._said_waiting and self._rank == 0:
            self._say(ToLeader.WAITING, what.encode())
            self._said_waiting = what

    def _fail(self, error: BaseException) -> None:
        """A device that fails takes its context with it: the worker ends and the leader starts the group again."""
        log.error("a step failed on the device", exc_info=error)
        logging.shutdown()
        os._exit(DEVICE_FAILED)

    def _refuse(self, error: StagemeshError, epoch: int) -> None:
        """A step, a frame or the opening of a lane broke the contract: it is dropped, the leader tells the router."""
        log.error("%s", error)
        self._lane = None
        if self._rank == 0:
            self._say(ToLeader.REFUSED, pack([epoch], U64), str(error).encode())
