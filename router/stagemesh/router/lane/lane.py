"""A lane's life: form, serve until a stage is lost, form again."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.chain import Member, check_chain
from stagemesh.router.lane.driving import limits_of
from stagemesh.router.lane.forming import LinkOpener, open_stages
from stagemesh.router.lane.stage_link import STALL_S, StageLink
from stagemesh.router.lane.stats import LaneStats
from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.scheduler import Request, Scheduler, Step, StepDeltas
from stagemesh.router.scheduler.event_log import EventLog
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.scheduler.step import encode_into
from stagemesh.router.tracing.step_spans import StepSpans
from stagemesh.v1 import admin_pb2, stage_pb2
from stagemesh.wire.columns import U32, unpack
from stagemesh.wire.errors import (
    ChainError,
    ConfigError,
    InternalError,
    InvalidArgumentError,
    StageLostError,
    StagemeshError,
    UnavailableError,
)

log = logging.getLogger(__name__)

POLL_S = 0.25
RETRY_S = 1.0

FORMING = admin_pb2.LANE_STATE_FORMING
READY = admin_pb2.LANE_STATE_READY
DRAINING = admin_pb2.LANE_STATE_DRAINING


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneEvents:
    """What a lane tells its owner, in its event loop."""

    on_deltas: Callable[[StepDeltas], None]
    """Never empty."""
    on_admitted: Callable[[Sequence], None]
    """The request's first step has been sent."""
    on_lost: Callable[[Request, StagemeshError], None]
    """The request's stream ends with that error."""
    on_ready: Callable[[bool], None]
    """The lane can, or can no longer, take requests."""
    on_forget: Callable[[], None]
    """A new epoch begins, whose steps count from 1: what is known of the steps before is about to be forgotten."""


class Lane:
    """A chain of one replica of each stage, and its scheduler.

    Args:
        config: Of the router.
        model_fingerprint: What every stage must have.
        max_context: Tokens of a sequence that every stage must take.
        events: Whom to tell.
        spans: Traces the steps; None where tracing is off.
    """

    def __init__(
        self,
        config: RouterConfig,
        model_fingerprint: str,
        max_context: int,
        events: LaneEvents,
        spans: StepSpans | None = None,
    ) -> None:
        self.lane_id = "lane-0"
        self._config = config
        self._fingerprint = model_fingerprint
        self._max_context = max_context
        self._events = events
        self._spans = spans
        self.records = StepRecords()
        self.stats = LaneStats()
        self.stages = [StageLink(index, address) for index, address in enumerate(config.stages)]
        self._links = LinkOpener(config.link_timeout_s, config.link_transport)
        self.state: admin_pb2.LaneState = FORMING
        self.reason = "starting"
        self.epoch = 0
        self.limiting_stage = 0
        self.num_steps = 0
        self.num_steps_ever = 0
        """Of all epochs."""
        self.num_formed = 0
        self.scheduler: Scheduler | None = None
        self._sent_at: dict[int, float] = {}
        self._lost: asyncio.Future[StagemeshError] | None = None
        self._pumping = False
        self._said = ""
        self._event_log = (
            EventLog(_open_log(config.event_log, "w", "--event-log")) if config.event_log else None
        )
        self._step_log = _open_log(config.step_log, "a", "--step-log") if config.step_log else None

    # Requests

    def submit(self, request: Request) -> None:
        """Hand a request to the scheduler; refusals are raised."""
        if self.scheduler is None:
            raise self.not_ready(request.request_id)
        now = time.monotonic()
        self.scheduler.submit(request, now)
        if self._event_log:
            self._event_log.submit(request, now)
        self._pump_soon()

    def not_ready(self, request_id: str = "") -> UnavailableError:
        """What is raised where there is no scheduler: what the lane waits for."""
        return UnavailableError(
            f"no lane is ready: {self.reason}",
            reason="LANE_NOT_READY",
            request_id=request_id,
            retry_after_s=1.0,
        )

    def abort(self, request_id: str) -> bool:
        """End a request; its blocks are free at once. False if it was not live."""
        deltas = self.scheduler.abort(request_id) if self.scheduler else StepDeltas()
        if not len(deltas):
            return False
        if self._event_log:
            self._event_log.abort(request_id)
        self._tell(deltas)
        self._pump_soon()
        return True

    def _tell(self, deltas: StepDeltas) -> None:
        self.stats.take(deltas, time.monotonic())
        self._events.on_deltas(deltas)

    # Life

    async def run(self) -> None:
        """Form the lane and serve, again and again, until cancelled."""
        try:
            while True:
                await self._form()
                error = await self._serve()
                log.error("lane lost: %s", error)
                self._drop(error)
                # Lest the end of an old stream, which raising the epoch brings about, is taken for the new one's.
                await self._close_streams()
        finally:
            await self._close_streams()
            for stage in self.stages:
                await stage.aclose()
            if self._event_log:
                self._event_log.close()
            if self._step_log:
                self._step_log.close()

    async def _form(self) -> None:
        while True:
            members = await self._gather()
            try:
                check_chain(members, self._fingerprint, self._max_context)
                await self._open(members)
            except ChainError as error:
                self._mark_refused(error)
            except StagemeshError as error:
                self._wait_for(f"opening the lane failed: {error}")
                await self._close_streams()
            else:
                return
            await asyncio.sleep(RETRY_S)

    async def _gather(self) -> list[Member]:
        """Every stage, ready; waits as long as it takes and says for which."""
        while True:
            members = await asyncio.gather(*(stage.describe() for stage in self.stages))
            missing = [stage for stage, member in zip(self.stages, members, strict=True) if member is None]
            if not missing:
                return [member for member in members if member is not None]
            self._wait_for(
                "waiting for " + ", ".join(f"{stage.name}: {_short(stage.detail)}" for stage in missing)
            )
            await asyncio.sleep(POLL_S)

    async def _open(self, members: list[Member]) -> None:
        limits = limits_of(self._config, members)
        # Above any epoch of a router before this one, since a restart must outrank what it left open.
        self.epoch = max(self.epoch + 1, time.time_ns() // 1_000_000)
        await open_stages(
            self.stages,
            stage_pb2.OpenLaneRequest(
                lane_id=self.lane_id,
                epoch=self.epoch,
                num_stages=len(members),
                num_blocks=limits.num_blocks,
                max_slots=limits.max_slots,
                depth=limits.depth,
                debug_logits=self._config.debug_logits,
            ),
        )
        await self._links.open(self.stages, self.epoch)
        self._lost = asyncio.get_running_loop().create_future()
        self._events.on_forget()
        for stage in self.stages:
            stage.timings.clear()
            stage.report = stage_pb2.StageReport()
            stage.execute(self.epoch, self._take_response, self._lose)
        self.scheduler = Scheduler(limits)
        if self._event_log:
            self._event_log.open(limits, self.epoch)
        self.num_steps = 0
        self.num_formed += 1
        self._sent_at.clear()
        if self._spans:
            self._spans.open_lane(self.epoch, self.records)
        self.records.clear()
        self.stats.open_lane(limits.max_slots)
        self.stats.totals.open_lane(self.scheduler)
        self.limiting_stage = min(members, key=lambda member: member.description.num_blocks).index
        self.state, self.reason, self._said = READY, "", ""
        log.info(
            "lane ready: %d stages, epoch %d, %d KV blocks of %d tokens (stage %d limits), %d microbatches, depth %d",
            len(members),
            self.epoch,
            limits.num_blocks,
            limits.block_size,
            self.limiting_stage,
            limits.num_microbatches,
            limits.depth,
        )
        self._events.on_ready(True)

    async def _serve(self) -> StagemeshError:
        """Watch until a stage is lost, or a bug shows, and return how."""
        assert self._lost is not None
        while True:
            asked = time.monotonic()
            done, _ = await asyncio.wait({self._lost}, timeout=POLL_S)
            if done:
                return self._lost.result()
            late_s = time.monotonic() - asked - POLL_S
            if late_s > STALL_S:
                self._excuse(late_s)
            if error := self._overdue():
                return error
            self._pump_soon()  # deadlines pass also where no result comes
            if self._event_log:
                self._event_log.flush()

    def _excuse(self, late_s: float) -> None:
        """The router had no turn for so long: what came meanwhile is still to be read, and nobody was silent for it."""
        log.warning("the router had no turn for %.1f s; its stages are given as much longer", late_s)
        now = time.monotonic()
        for stage in self.stages:
            stage.heard_at = min(now, stage.heard_at + late_s)
        self._sent_at = {number: min(now, sent + late_s) for number, sent in self._sent_at.items()}

    def _overdue(self) -> StageLostError | None:
        """The control plane is the failure detector: silence and unanswered steps name their stage."""
        now = time.monotonic()
        for stage in self.stages:
            silent_s = now - stage.heard_at
            if silent_s > self._config.heartbeat_timeout_s:
                return stage.lost(f"no heartbeat for {silent_s:.1f} s")
        number = self.scheduler.oldest_in_flight if self.scheduler else 0
        waited_s = now - self._sent_at.get(number, now)
        if waited_s <= self._config.step_timeout_s:
            return None
        culprit = next((stage for stage in self.stages if stage.report.last_done < number), self.stages[-1])
        waiting = f", it waits for {culprit.report.waiting_for}" if culprit.report.waiting_for else ""
        return culprit.lost(f"step {number} is unanswered for {waited_s:.0f} s{waiting}")

    def _drop(self, error: StagemeshError) -> None:
        scheduler, self.scheduler = self.scheduler, None
        self.state, self.reason = FORMING, str(error)
        self._events.on_ready(False)
        for sequence in scheduler.live if scheduler else []:
            self._events.on_lost(sequence.request, error)

    async def _close_streams(self) -> None:
        await asyncio.gather(*(stage.close_stream() for stage in self.stages))

    def _lose(self, stage: StageLink, how: str, blamed: str) -> None:
        """A stage's stream ended. If a link broke, the stage at its other end is the one that was lost."""
        if self._lost and not self._lost.done():
            culprit = next((other for other in self.stages if other.address == blamed), stage)
            self._lost.set_result(culprit.lost(how if culprit is stage else f"{stage.name} says: {how}"))

    def _wait_for(self, reason: str) -> None:
        self.state, self.reason = FORMING, reason
        if reason != self._said:
            log.info("%s", reason)
            self._said = reason

    def _mark_refused(self, error: ChainError) -> None:
        for stage in self.stages:
            if stage.name == error.stage:
                stage.state, stage.detail = "refused", str(error)
        self._wait_for(f"the stages do not make a lane: {error}")

    # Steps

    def _pump_soon(self) -> None:
        """Form steps at the end of this turn of the loop, so that requests that came together go together."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        try:
            self._send_steps()
        except Exception as error:
            # Nothing would be sent any more, and nobody told: what runs ends, and the lane forms again.
            log.exception("bug in forming a step")
            if self._lost and not self._lost.done():
                how = f"bug in forming a step: {type(error).__name__}: {error}"
                self._lost.set_result(InternalError(how, reason="BUG"))

    def _send_steps(self) -> None:
        now = time.monotonic()
        if self.scheduler and len(expired := self.scheduler.expire(now)):
            if self._event_log:
                self._event_log.expire(now)
            self._tell(expired)
        if self.scheduler and (step := self._next_step(self.scheduler)):
            self._send(step)
            if not self.scheduler.full:
                self._pump_soon()  # the next is formed when this one is on its way

    def _send(self, step: Step) -> None:
        sent_ns = time.monotonic_ns()
        traceparent = self._spans.step_sent(step) if self._spans else ""
        message = stage_pb2.ExecuteRequest()
        encode_into(message.steps.add(), step, self.epoch, traceparent)
        request = message.SerializeToString()
        for stage in self.stages:
            stage.send(request)
        self._sent_at[step.number] = sent_ns / 1e9
        self.records.sent(step, sent_ns)
        self.num_steps += 1
        self.num_steps_ever += 1
        for sequence in step.changes.admitted:
            self.stats.admitted(sequence, sent_ns / 1e9)
            self._events.on_admitted(sequence)
        if self._step_log:
            self._log_step(step, len(request))

    def _next_step(self, scheduler: Scheduler) -> Step | None:
        now = time.monotonic()
        step = scheduler.next_step(now)
        if self._event_log:
            self._event_log.step(step, now)
        return step

    def _take_response(self, stage: StageLink, response: stage_pb2.ExecuteResponse) -> None:
        try:
            if response.HasField("report") and response.report.epoch == self.epoch:
                self._take_report(stage, response.report)
            for result in response.results:
                if self.scheduler and result.epoch == self.epoch:
                    self._take_result(self.scheduler, result)
        except InvalidArgumentError as error:
            # A stage that breaks the contract cannot be followed any further.
            self._lose(stage, f"it answered what nobody asked: {error}", "")
        if response.results:
            self._pump_soon()

    def _take_report(self, stage: StageLink, report: stage_pb2.StageReport) -> None:
        stage.clock.came(report.monotonic_ns, time.monotonic_ns())
        numbers, times_ns = stage.timings.add(report)
        stage.report = report
        if not len(numbers):
            return
        if self.scheduler:
            self.scheduler.take_timings(stage.index, numbers, times_ns)
            if self._event_log:
                self._event_log.timings(stage.index, numbers, times_ns)
        arrivals = times_ns[:, 0]
        known, columns = self.records.of(numbers)
        if len(known) == len(numbers):
            quickest = int((arrivals - columns[:, 0]).argmin())
            stage.clock.went(int(columns[quickest, 0]), int(arrivals[quickest]))

    def _take_result(self, scheduler: Scheduler, result: stage_pb2.StepResult) -> None:
        self._sent_at.pop(result.number, None)
        self.records.done(result.number, time.monotonic_ns())
        if self._step_log:
            self._log_result(result)
        token_ids = unpack(result.token_ids, U32, "token_ids")
        now = time.monotonic()
        deltas = scheduler.take_result(result.number, token_ids, now)
        if self._event_log:
            self._event_log.result(result.number, token_ids, now)
        if len(deltas):
            self._tell(deltas)

    def _log_step(self, step: Step, num_bytes: int) -> None:
        assert self._step_log is not None
        rows = [
            (sequence.request.request_id, int(count), bool(sample))
            for sequence, count, sample in zip(step.sequences, step.counts, step.sample, strict=True)
        ]
        self._step_log.write(json.dumps({"step": step.number, "bytes": num_bytes, "rows": rows}) + "\n")
        self._step_log.flush()

    def _log_result(self, result: stage_pb2.StepResult) -> None:
        assert self._step_log is not None
        line = {"result": result.number, "tokens": unpack(result.token_ids, U32, "token_ids").tolist()}
        if result.logits:
            line["logits"] = result.logits.hex()
        self._step_log.write(json.dumps(line) + "\n")
        self._step_log.flush()


def _short(detail: str) -> str:
    """gRPC's connection errors repeat the address three times; the last part says what happened."""
    return detail.rpartition(": ")[2] if detail.startswith("failed to connect") else detail


def _open_log(path: str, mode: str, key: str) -> TextIO:
    """A log of the lane, open as long as it; ConfigError names the setting."""
    try:
        return cast(TextIO, Path(path).open(mode))
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be written: {error.strerror}") from error
