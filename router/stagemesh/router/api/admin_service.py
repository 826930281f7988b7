"""The RPCs of AdminService, for operators."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version
from typing import TypeAlias

import grpc.aio
import numpy as np

from stagemesh.router.api.requests import Requests
from stagemesh.router.lane.lane import DRAINING, READY, Lane
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.router.lane.timeline import record_timeline
from stagemesh.router.lane.timings import BUSY, COLUMNS
from stagemesh.router.worker.pool import WorkerPool
from stagemesh.v1 import admin_pb2
from stagemesh.wire.errors import InvalidArgumentError, NotFoundError

WATCH_INTERVAL_MS = 1_000
TIMELINE_S = 5.0
TIMELINE_MAX_S = 60.0
DRAIN_MARGIN_S = 1.0
"""Before the caller's deadline, so that it hears how many are left."""

Context: TypeAlias = grpc.aio.ServicerContext


class AdminService:
    """Serves the status of one router.

    Args:
        requests: Of the router.
        workers: Its API workers, if it has any.
    """

    def __init__(self, requests: Requests, workers: WorkerPool | None = None) -> None:
        self._requests = requests
        self._workers = workers
        self._started = time.monotonic()
        self._version = version("stagemesh")

    async def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(status=self._status())

    async def WatchStatus(self, request: admin_pb2.WatchStatusRequest, context: Context) -> None:
        while True:
            await context.write(admin_pb2.WatchStatusResponse(status=self._status()))
            await asyncio.sleep((request.interval_ms or WATCH_INTERVAL_MS) / 1000)

    async def GetRequestTrace(
        self, request: admin_pb2.GetRequestTraceRequest, context: Context
    ) -> admin_pb2.GetRequestTraceResponse:
        trace = await self._requests.history.settled(request.request_id)
        if trace is None:
            raise NotFoundError(
                f"request '{request.request_id}' is not among the last requests of this router",
                reason="REQUEST_UNKNOWN",
                request_id=request.request_id,
            )
        return trace

    async def GetTimeline(
        self, request: admin_pb2.GetTimelineRequest, context: Context
    ) -> admin_pb2.GetTimelineResponse:
        seconds = request.seconds or TIMELINE_S
        if not 0 < seconds <= TIMELINE_MAX_S:
            raise InvalidArgumentError(
                f"seconds is {seconds:g}; expected above 0 and at most {TIMELINE_MAX_S:g}",
                field="seconds",
                reason="BAD_FIELD",
            )
        return await record_timeline(self._requests.lane, seconds)

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            remaining_s -= min(DRAIN_MARGIN_S, remaining_s / 2)
        left = await self._requests.drain(remaining_s)
        return admin_pb2.DrainResponse(num_left=left)

    def _status(self) -> admin_pb2.MeshStatus:
        requests, scheduler = self._requests, self._requests.lane.scheduler
        stats = requests.lane.stats
        ttft_p50, ttft_p99 = stats.recent_ttft.percentiles(50, 99)
        gap_p50, gap_p99 = stats.recent_inter_token.percentiles(50, 99)
        return admin_pb2.MeshStatus(
            version=self._version,
            model_name=requests.model.name,
            lanes=[_lane_status(requests.lane, requests.draining)],
            num_running=scheduler.num_running if scheduler else 0,
            num_waiting=scheduler.num_waiting if scheduler else 0,
            num_finished=requests.num_finished,
            num_failed=requests.num_failed,
            prompt_tokens=requests.prompt_tokens,
            output_tokens=requests.output_tokens,
            uptime_seconds=time.monotonic() - self._started,
            api_workers=self._workers.status() if self._workers else [],
            ttft_p50_ms=ttft_p50 * 1e3,
            ttft_p99_ms=ttft_p99 * 1e3,
            inter_token_p50_ms=gap_p50 * 1e3,
            inter_token_p99_ms=gap_p99 * 1e3,
            num_preemptions=stats.totals.preemptions,
            queried_tokens=stats.totals.prompt_tokens,
            cached_tokens=stats.totals.cached_tokens,
        )


def _lane_status(lane: Lane, draining: bool) -> admin_pb2.LaneStatus:
    status = admin_pb2.LaneStatus(
        lane_id=lane.lane_id,
        state=DRAINING if draining and lane.state == READY else lane.state,
        reason=lane.reason,
        epoch=lane.epoch,
        num_steps=lane.num_steps,
        stages=[_stage_status(lane, stage) for stage in lane.stages],
    )
    if scheduler := lane.scheduler:
        limits = scheduler.limits
        status.num_blocks = limits.num_blocks
        status.num_free_blocks = scheduler.pool.num_free
        status.block_size = limits.block_size
        status.limiting_stage = lane.limiting_stage
        status.steps_in_flight = scheduler.num_in_flight
        status.depth = limits.depth
        state = scheduler.pace.state()
        status.max_in_flight = state.num_microbatches
        status.allowed_in_flight = state.max_in_flight
        status.slowest_stage = state.limiting_stage
        status.cycle_ms = state.cycle_s * 1e3
        status.ring_hops_ms = state.ring_s * 1e3
        status.trip_hops_ms = state.trip_s * 1e3
        status.itl_p95_ms = state.itl_p95_s * 1e3
        status.prefill_backlog = scheduler.backlog
        status.num_preemptions = scheduler.num_preemptions
        for stage, step_s in zip(status.stages, state.step_s, strict=False):
            stage.step_ms = step_s * 1e3
    return status


def _stage_status(lane: Lane, stage: StageLink) -> admin_pb2.StageStatus:
    status = admin_pb2.StageStatus(
        stage_index=stage.index,
        address=stage.address,
        state=stage.state,
        detail=stage.detail,
        description=stage.description,
    )
    if lane.state != READY:
        return status
    receiver = lane.stages[(stage.index + 1) % len(lane.stages)]
    if receiver is stage:
        status.link_transport, status.link_reason = "local", "one stage: tokens stay where they are"
    else:
        status.link_transport, status.link_reason = stage.link_transport, stage.link_reason
    times_ms = stage.timings.recent() / 1e6
    if len(times_ms):
        status.mean_wait_ms = float(times_ms[:, COLUMNS.index("wait")].mean())
        status.mean_compute_ms = float(times_ms[:, COLUMNS.index("compute")].mean())
        busy = np.percentile(times_ms[:, BUSY].sum(axis=1), (50, 99))
        status.busy_p50_ms, status.busy_p99_ms = busy.tolist()
    status.bubble_share = lane.records.recent_bubble_share(stage.timings)
    status.clock_offset_ns = stage.clock.offset_ns
    status.clock_error_ns = stage.clock.error_ns or 0
    status.busy_share = stage.timings.busy_share()
    return status
