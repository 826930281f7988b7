"""What each step of some seconds did on each stage, on one clock."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import numpy.typing as npt

from stagemesh.router.lane.lane import Lane
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.router.lane.timings import STEPS_KEPT
from stagemesh.v1 import admin_pb2
from stagemesh.wire.columns import U64, pack

REPORT_WAIT_S = 1.0
"""Stages report in batches: what they did last is known this long after it."""
POLL_S = 0.05


async def record_timeline(lane: Lane, seconds: float) -> admin_pb2.GetTimelineResponse:
    """Watch for so long. Where the lane was formed anew meanwhile, the steps of its last epoch alone are in it.
    UnavailableError if it is not ready to begin with."""
    if lane.scheduler is None:
        raise lane.not_ready()
    epoch, formed, before = lane.epoch, lane.num_formed, lane.num_steps
    await asyncio.sleep(seconds)
    if lane.num_formed == formed:
        # A lane that is lost raises its epoch before it is formed: what it did is of the epoch that it had.
        first = before + 1
    else:
        first, epoch = 1, lane.epoch
    numbers = np.arange(max(first, lane.num_steps - STEPS_KEPT + 1), lane.num_steps + 1)
    await _wait_for_reports(lane, int(numbers[-1]) if len(numbers) else 0)
    wall = time.time_ns() - time.monotonic_ns()
    known, columns = lane.records.of(numbers)
    sent, done, rows, tokens, prefill = columns.T
    return admin_pb2.GetTimelineResponse(
        lane_id=lane.lane_id,
        epoch=epoch,
        numbers=pack(known, U64),
        sent_unix_ns=pack(sent + wall, U64),
        done_unix_ns=pack(np.where(done > 0, done + wall, 0), U64),
        rows=pack(rows, U64),
        tokens=pack(tokens, U64),
        prefill_tokens=pack(prefill, U64),
        stages=[_stage(stage, known, wall) for stage in lane.stages],
    )


async def _wait_for_reports(lane: Lane, number: int) -> None:
    deadline = time.monotonic() + REPORT_WAIT_S
    while time.monotonic() < deadline and any(not stage.timings.has(number) for stage in lane.stages):
        await asyncio.sleep(POLL_S)


def _stage(stage: StageLink, numbers: npt.NDArray[np.int64], wall: int) -> admin_pb2.StageTimeline:
    known, arrivals, times = stage.timings.spans_of(numbers)
    queue, wait, receive, compute, send = (pack(column, U64) for column in times.T)
    return admin_pb2.StageTimeline(
        stage_index=stage.index,
        address=stage.address,
        numbers=pack(numbers[known], U64),
        arrival_unix_ns=pack(arrivals - stage.clock.offset_ns + wall, U64),
        queue_ns=queue,
        wait_ns=wait,
        receive_ns=receive,
        compute_ns=compute,
        send_ns=send,
        clock_offset_ns=stage.clock.offset_ns,
        clock_error_ns=stage.clock.error_ns or 0,
    )
