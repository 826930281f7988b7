"""The stage: its worker group and the lane it serves, whatever happens to either."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from pathlib import Path

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from stagemesh.stage.config import StageConfig
from stagemesh.stage.leader.lane import LeaderLane
from stagemesh.stage.leader.loading import LoadDisplay, load_line
from stagemesh.stage.leader.stats import StageStats
from stagemesh.stage.leader.step_spans import StepSpans
from stagemesh.stage.leader.unix_link import UnixListener, UnixReading, connect
from stagemesh.stage.leader.worker_group import WorkerGroup
from stagemesh.stage.local_queue import TensorHeader, Timings, ToLeader, ToWorker, unpack_timings
from stagemesh.stage.local_socket import Part
from stagemesh.stage.plan import StagePlan
from stagemesh.stage.unix_link import TRANSPORT, UnixReceiver
from stagemesh.v1 import stage_pb2
from stagemesh.wire import protocol
from stagemesh.wire.columns import U64, pack, unpack
from stagemesh.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    StageLostError,
    StagemeshError,
    StartupError,
    UnavailableError,
)
from stagemesh.wire.process import settle

log = logging.getLogger(__name__)

SERVICE_NAME = "stagemesh.v1.StageService"
RESTART_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0)
"""Before the first start after a group was lost, the second, and so on."""
STEADY_S = 60.0
"""A group that served for so long was no failure."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StageLeader:
    """One stage.

    Args:
        config: Its settings.
        plan: Its share of the model.
        name: What it calls itself in errors.
        health: Says NOT_SERVING for the stage service while the workers are not there.
        version: Of the package.
        spans: Takes the steps that are traced; None where tracing is off.
        stats: Counts, for metrics; None where nobody asks for them.
    """

    def __init__(
        self,
        config: StageConfig,
        plan: StagePlan,
        name: str,
        health: health_aio.HealthServicer,
        version: str,
        spans: StepSpans | None = None,
        stats: StageStats | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._name = name
        self._health = health
        self._version = version
        self._spans = spans
        self.stats = stats
        self._group: WorkerGroup | None = None
        self._not_ready = "loading"
        self._incarnation = ""
        self._lane: LeaderLane | None = None
        self._epoch = 0
        self._opening = asyncio.Lock()

    @property
    def not_ready(self) -> str:
        """Why it cannot serve now; empty when it can."""
        return self._not_ready

    async def supervise(self) -> None:
        """Keep a worker group running; StartupError if the first one cannot start."""
        failures = 0
        while True:
            display = LoadDisplay(self._name)
            group = WorkerGroup(self._config, self._take, display.update, used_bytes=self._plan.used_bytes)
            try:
                with display:
                    await group.start()
            except StartupError as error:
                await group.stop()
                if not self._incarnation:
                    raise
                log.error("the workers cannot start again: %s", error)
            except BaseException:
                await group.stop()
                raise
            else:
                began = time.monotonic()
                await self._serve_with(group)
                if time.monotonic() - began > STEADY_S:
                    failures = 0
            failures += 1
            await asyncio.sleep(RESTART_BACKOFF_S[min(failures, len(RESTART_BACKOFF_S)) - 1])

    async def _serve_with(self, group: WorkerGroup) -> None:
        self._incarnation = uuid.uuid4().hex
        self._group = group
        self._not_ready = ""
        if self.stats:
            self.stats.groups_started += 1
        await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        log.info("%s", load_line(self._plan, group.facts, self._config))
        settle()
        next_state = "stopping"
        try:
            # Shielded: a group that is asked to stop because this task is cancelled is not a lost one.
            what = await asyncio.shield(group.lost)
            next_state = f"{what}; starting again"
            # The router hears of it at once: what is left of the group may take its time to end.
            self._fail_lane(StageLostError(f"{self._name}: {what}", reason="STAGE_LOST", stage=self._name))
        finally:
            self._group, self._not_ready = None, next_state
            if self._lane:
                self._lane.close_receivers()  # they read for ranks that are no more
            await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
            await group.stop()

    async def aclose(self) -> None:
        """End the lane; its router gets UNAVAILABLE."""
        self._fail_lane(
            StageLostError(f"{self._name} is shutting down", reason="STAGE_LOST", stage=self._name)
        )
        if self._lane:
            self._lane.close_receivers()
            await self.close_lane(self._lane)

    def describe(self) -> stage_pb2.DescribeResponse:
        """What the stage is; `not_ready_reason` says why it cannot serve yet."""
        model, plan = self._plan.source.config, self._plan
        facts = self._group.facts if self._group else []
        response = stage_pb2.DescribeResponse(
            protocol_major=protocol.MAJOR,
            protocol_minor=protocol.MINOR,
            version=self._version,
            model_fingerprint=plan.source.fingerprint,
            architecture=model.architecture,
            num_layers=model.num_layers,
            layer_begin=plan.layers.start,
            layer_end=plan.layers.stop,
            dtype=plan.dtype,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            max_context=plan.max_context,
            block_size=self._config.block_size,
            num_blocks=plan.num_blocks,
            max_slots=self._config.max_slots,
            host_id=BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname(),
            host_name=socket.gethostname(),
            num_cores=len(os.sched_getaffinity(0)),
            threads_per_rank=self._config.num_threads,
            transports=self.transports(),
            max_step_tokens=self._config.max_step_tokens if plan.gpus else 0,
            incarnation=self._incarnation,
            not_ready_reason=self._not_ready,
            monotonic_ns=time.monotonic_ns(),
        )
        for fact in facts:
            response.ranks.add(
                rank=fact.rank,
                device=fact.device,
                num_heads=fact.num_heads,
                num_kv_heads=fact.num_kv_heads,
                mlp_columns=fact.mlp_columns,
                weight_bytes=fact.weight_bytes,
                kv_bytes=fact.kv_bytes,
                process_id=fact.process_id,
                gpu_id=fact.backends.get("gpu-id", ""),
                backends=fact.backends,
            )
        if facts:
            for phase, seconds in facts[0].load_seconds.items():
                response.load_phases.add(name=phase, seconds=seconds)
        return response

    def transports(self) -> list[str]:
        """Ways to reach a neighbour, best first; NCCL where every rank has it, Unix sockets where none has a GPU."""
        facts = self._group.facts if self._group else []
        nccl = bool(facts) and all(fact.backends.get("links") == "nccl" for fact in facts)
        unix = not self._plan.gpus and hasattr(socket, "AF_UNIX")
        return [*(["nccl"] if nccl else []), *([TRANSPORT] if unix else []), "grpc"]

    async def open_lane(self, request: stage_pb2.OpenLaneRequest) -> str:
        """Raise the epoch; returns the incarnation that serves it."""
        async with self._opening:
            if request.epoch <= self._epoch:
                raise FailedPreconditionError(
                    f"epoch {request.epoch} is not above {self._epoch}, which {self._name} has already seen: "
                    "another router opened a lane here",
                    reason="STALE_EPOCH",
                )
            self._check_opening(request)
            self._epoch = request.epoch
            self._fail_lane(
                UnavailableError(f"{self._name} now serves epoch {request.epoch}", reason="EPOCH_RAISED")
            )
            if self._lane:
                self._lane.close_receivers()
                await self.close_lane(self._lane)
                self.take_timings(self._lane)  # lest its numbers come among those of the new epoch
            self._lane = LeaderLane(request, self.stats)
            if self._spans:
                self._spans.open_lane(request.stage_index, request.epoch)
            if self.stats:
                self.stats.open_lane()
            self._require_group().broadcast(ToWorker.OPEN, request.SerializeToString())
            return self._incarnation

    def lane(self, epoch: int) -> LeaderLane:
        """The open lane, if it is of that epoch."""
        if self._lane is None or self._lane.epoch != epoch:
            have = self._lane.epoch if self._lane else "none"
            raise FailedPreconditionError(
                f"epoch {epoch} is not open on {self._name} (open: {have})",
                reason="STALE_EPOCH",
                stage=self._name,
            )
        if self._lane.error:
            raise self._lane.error
        return self._lane

    async def close_lane(self, lane: LeaderLane) -> None:
        """Close the links it sends on, so that the neighbours see that it is over."""
        if self._group:
            self._group.broadcast(ToWorker.CLOSE, pack([lane.epoch], U64))
        await lane.close()

    def hand_steps(
        self, lane: LeaderLane, request: stage_pb2.ExecuteRequest, data: bytes, arrival_ns: int
    ) -> None:
        """Pass a message of steps to the workers as it came in."""
        if steps := request.steps:
            newest = steps[-1]
            lane.last_received = newest.number
            if self._spans:
                for step in steps:
                    if traceparent := step.traceparent:
                        self._spans.take_step(step.number, traceparent)
            if self.stats:
                self.stats.take_steps(steps)
            self._require_group().broadcast(ToWorker.STEPS, arrival_ns.to_bytes(8, "little"), data)

    def take_timings(self, lane: LeaderLane) -> Timings:
        """The steps that are done since the last call, for the router; their spans get them too: once a report, since
        for each step it would cost more than all else of its tracing here."""
        timings = lane.take_timings()
        if self._spans and self._spans.any_traced and len(timings):
            self._spans.take_timings(timings)
        return timings

    async def prepare_nccl(self, lane: LeaderLane, kind: int, timeout_s: float) -> list[bytes]:
        """The unique id of every rank's end of a link that this stage receives on, in rank order."""
        answers = lane.ask_ranks(("prepare", kind), self._config.tp)
        self._require_group().broadcast(ToWorker.PREPARE, pack([lane.epoch, kind], U64))
        return await self._answers(answers, timeout_s, "did not prepare the link")

    async def connect_nccl(
        self, lane: LeaderLane, request: stage_pb2.ConnectLinkRequest, timeout_s: float
    ) -> None:
        """Let every rank open its end; StageLostError says which one could not, and why."""
        answers = lane.ask_ranks(("connect", request.kind, request.sender), self._config.tp)
        self._require_group().broadcast(ToWorker.CONNECT, request.SerializeToString())
        for rank, problem in enumerate(await self._answers(answers, timeout_s, "did not open the link")):
            if problem:
                raise StageLostError(
                    f"{self._name}: rank {rank} cannot open the link: {problem.decode()}",
                    reason="LINK_FAILED",
                    stage=self._name,
                )

    def prepare_unix(self, lane: LeaderLane, kind: int) -> str:
        """The path on which the sender of that link finds this stage."""
        if kind in lane.listeners:
            lane.listeners.pop(kind).close()
        lane.listeners[kind] = UnixListener(self._require_group().folder, lane.epoch, kind)
        return lane.listeners[kind].path

    async def connect_unix(
        self, lane: LeaderLane, request: stage_pb2.ConnectLinkRequest, timeout_s: float
    ) -> None:
        """Open one end and hand it to who uses it: rank 0 sends; the only rank receives, or else the leader."""
        if request.sender:
            end = await connect(request.unix_path, lane.epoch, request.kind, timeout_s)
            self._hand_link(lane, request, end)
            if lane.stats:
                lane.stats.send_from_worker(request.kind, TRANSPORT)
            return
        if not (listener := lane.listeners.pop(request.kind, None)):
            raise FailedPreconditionError("ConnectLink came before PrepareLink", reason="LINK_NOT_PREPARED")
        try:
            end = await listener.accept(timeout_s)
        finally:
            listener.close()
        # The ranks of a group must see one order of messages (rule 11), so a link to several goes through here.
        if self._config.tp == 1:
            self._hand_link(lane, request, end)
        else:
            lane.readings[request.kind] = UnixReading(
                UnixReceiver(end, lane.epoch, request.kind),
                self._require_group().broadcast,
            )

    def _hand_link(self, lane: LeaderLane, request: stage_pb2.ConnectLinkRequest, end: socket.socket) -> None:
        where = pack([lane.epoch, request.kind, request.sender], U64)
        self._require_group().hand_end(ToWorker.LINK, where, request.peer_address.encode(), end=end)

    async def _answers(
        self, answers: list[asyncio.Future[bytes]], timeout_s: float, what: str
    ) -> list[bytes]:
        try:
            return await asyncio.wait_for(asyncio.gather(*answers), timeout_s)
        except TimeoutError:
            late = [rank for rank, answer in enumerate(answers) if answer.cancelled()]
            raise StageLostError(
                f"{self._name}: rank {late[0]} {what} within {timeout_s:g} s",
                reason="LINK_FAILED",
                stage=self._name,
            ) from None

    def hand_frame(self, data: bytes, arrival_ns: int) -> None:
        """Pass a frame to the workers as it came in."""
        self._require_group().broadcast(ToWorker.FRAME, arrival_ns.to_bytes(8, "little"), data)

    def _require_group(self) -> WorkerGroup:
        if self._group is None:
            raise UnavailableError(
                f"{self._name} has no workers: {self._not_ready}", reason="STAGE_NOT_READY", stage=self._name
            )
        return self._group

    def _check_opening(self, request: stage_pb2.OpenLaneRequest) -> None:
        self._require_group()
        if not 0 < request.num_blocks <= self._plan.num_blocks:
            raise InvalidArgumentError(
                f"num_blocks is {request.num_blocks}; {self._name} has {self._plan.num_blocks}",
                field="num_blocks",
            )
        limit = self._config.max_slots * max(1, request.num_stages)
        if self._plan.gpus:  # whose tables are made before it is known how many stages there are
            limit = min(limit, self._plan.max_slots)
        if not 0 < request.max_slots <= limit:
            raise InvalidArgumentError(
                f"max_slots is {request.max_slots}; {self._name} takes {limit}", field="max_slots"
            )

    def _fail_lane(self, error: StagemeshError) -> None:
        if self._lane:
            self._lane.fail(error)

    def _take(self, kind: ToLeader, parts: list[Part]) -> None:
        """A worker's message; those of an older epoch are dropped."""
        lane = self._lane
        if lane is None:
            return
        if kind is ToLeader.RESULT:
            lane.add_result(parts[0].bytes)
        elif kind is ToLeader.DONE:
            timings = lane.add_timings(parts[0].bytes)
            if self.stats:
                self.stats.take_timings(timings)
        elif kind is ToLeader.RANK_DONE:
            if self._spans and self._spans.any_traced:
                (rank,) = unpack(parts[0].bytes, U64, "rank", 1)
                self._spans.take_rank(int(rank), unpack_timings(parts[1].bytes))
        elif kind is ToLeader.TENSOR:
            header = TensorHeader.unpack(parts[0].bytes)
            sender = lane.senders.get(header.kind)
            if header.epoch == lane.epoch and sender:
                sender.send(header.step, parts[1].buffer)
        elif kind is ToLeader.PREPARED:
            rank, epoch, link = unpack(parts[0].bytes, U64, "prepared", 3).tolist()
            if epoch == lane.epoch:
                lane.answer(("prepare", link), rank, parts[1].bytes)
        elif kind is ToLeader.CONNECTED:
            rank, epoch, link, sender = unpack(parts[0].bytes, U64, "connected", 4).tolist()
            if epoch == lane.epoch:
                lane.answer(("connect", link, bool(sender)), rank, parts[1].bytes)
        elif kind is ToLeader.BROKEN and int.from_bytes(parts[0].bytes, "little") == lane.epoch:
            what, blamed = parts[1].bytes.decode(), parts[2].bytes.decode()
            lane.fail(
                StageLostError(what, reason="STAGE_LOST", stage=blamed)
                if blamed
                else StageLostError(f"{self._name}: {what}", reason="LINK_FAILED", stage=self._name)
            )
        elif kind is ToLeader.WAITING:
            lane.waiting_for = parts[0].bytes.decode()
        elif kind is ToLeader.REFUSED and int.from_bytes(parts[0].bytes, "little") == lane.epoch:
            lane.fail(InvalidArgumentError(f"{self._name}: {parts[1].bytes.decode()}", reason="BAD_STEP"))
