"""Traces of the last requests: where their time went, stage by stage."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from stagemesh.router.api.live_request import LiveRequest
from stagemesh.router.lane.stage_link import STALL_S, StageLink
from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.lane.timings import BUSY, COLUMNS, STEPS_KEPT, Int64
from stagemesh.router.tracing.tracing import RouterTracing
from stagemesh.v1 import admin_pb2

REQUESTS_KEPT = 1_000
SETTLE_S = 1.0
"""Stages report in batches: the last steps of a request are usually known this long after it ended."""
MAX_SETTLE_S = 5.0
"""What the stages have not reported by then is missing in its trace, unless the router itself had no turn to read it."""
POLL_S = 0.02
PAUSE_S = 0.05
"""At least, between two times that requests are settled: those that ended a few steps apart cost one wake-up."""
SWEEP_S = 2.0
SAFE_STEPS = STEPS_KEPT * 3 // 8
"""A request whose first step is so old when it ends is not left for later: one behind it, as old by then as this, is found
before the first of its steps is forgotten."""
_MS = 1e6


class Outline(NamedTuple):
    """What a request's trace is worked out from, beside the stages' times."""

    told: bytes
    """The trace without stages, serialized: many small objects that stay would hold the memory of those around them."""
    prefill_steps: Int64
    """Numbers of the steps that computed its prompt, ascending; none if it was refused."""
    sampled_steps: Int64
    """Of those that sampled for it."""

    @property
    def first_step(self) -> int:
        """0 if it had none."""
        return int(self.prefill_steps[0]) if len(self.prefill_steps) else 0

    @property
    def decode_steps(self) -> Int64:
        """Those that sampled for it and computed nothing of its prompt."""
        decodes: Int64 = self.sampled_steps[~np.isin(self.sampled_steps, self.prefill_steps)]
        return decodes


class RequestHistory:
    """The last REQUESTS_KEPT requests, live ones included.

    Args:
        stages: Of the lane; their timings are read when a trace is made.
        records: Of the lane's steps.
        tracing: Gets the sampled ones when they have ended.
    """

    def __init__(
        self, stages: Seq[StageLink], records: StepRecords, tracing: RouterTracing | None = None
    ) -> None:
        self._stages = stages
        self._records = records
        self._tracing = tracing
        if tracing:
            tracing.requests.stages = stages
        self._kept: OrderedDict[str, LiveRequest | Outline | bytes] = OrderedDict()
        """Of a settled one its outline, or its trace serialized."""
        self._unread: OrderedDict[str, Outline] = OrderedDict()
        """Those of the kept whose times are still to be read, as they settled: when somebody asks, or when the stages are about
        to forget them. Most are gone before that."""
        self._unsettled: deque[tuple[float, LiveRequest]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When that timer should go off."""

    def add(self, live: LiveRequest) -> None:
        """Keep a request from its admission on."""
        request_id = live.request.request_id
        self._kept.pop(request_id, None)
        self._unread.pop(request_id, None)
        self._kept[request_id] = live
        while len(self._kept) > REQUESTS_KEPT:
            self._unread.pop(self._kept.popitem(last=False)[0], None)

    def end(self, live: LiveRequest) -> None:
        """The request has ended; its trace is worked out when the stages have reported its last steps."""
        self._unsettled.append((time.monotonic() + SETTLE_S, live))
        if len(self._unsettled) > REQUESTS_KEPT:
            self._settle(self._unsettled.popleft()[1])
        if self._timer is None:
            self._settle_after(SETTLE_S)

    def _settle_after(self, pause_s: float) -> None:
        self._due = time.monotonic() + pause_s
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._settle_due)

    def _settle_due(self) -> None:
        now = time.monotonic()
        stalled = self._timer is not None and now - self._due > STALL_S
        self._timer = None
        while self._unsettled and self._unsettled[0][0] <= now:
            live = self._unsettled.popleft()[1]
            # After a stall the reports of that time are still in the sockets: what lacks them waits once more.
            if self._is_reported(live) or (now - live.ended >= MAX_SETTLE_S and not stalled):
                self._settle(live)
            else:
                self._unsettled.append((now + SETTLE_S, live))
        self._read_old()
        if self._unsettled or self._unread:
            pause_s = self._unsettled[0][0] - now if self._unsettled else SWEEP_S
            self._settle_after(min(max(pause_s, PAUSE_S), SWEEP_S))

    def _is_reported(self, live: LiveRequest) -> bool:
        """Whether every stage has said where the time of its last step went."""
        if live.sequence is None:
            return True
        last_step = live.sequence.last_step
        return all(stage.timings.has(last_step) for stage in self._stages)

    def _settle(self, live: LiveRequest) -> None:
        """Keep what its trace follows from, and let go of the rest."""
        request_id, outline = live.request.request_id, _outline(live)
        if self._tracing and live.request.trace and live.sequence:
            self._tracing.requests.add(live, outline.prefill_steps, outline.decode_steps)
        if self._kept.get(request_id) is live:
            self._kept[request_id] = self._unread[request_id] = outline
            if outline.first_step <= self._records.newest - SAFE_STEPS:
                self._read(request_id)

    def _read(self, request_id: str) -> None:
        """Work out a settled one's trace while the stages' times are still kept."""
        self._kept[request_id] = self._trace(self._unread.pop(request_id)).SerializeToString()

    def _read_old(self) -> None:
        """Those whose first steps' times will be forgotten."""
        while self._unread:
            request_id, outline = next(iter(self._unread.items()))
            if outline.first_step > self._records.newest - SAFE_STEPS:
                break
            self._read(request_id)

    def settle_all(self) -> None:
        """What the stages have reported is about to be forgotten: what has ended makes do with what is there."""
        while self._unsettled:
            self._settle(self._unsettled.popleft()[1])
        for request_id in tuple(self._unread):
            self._read(request_id)
        if self._tracing:
            self._tracing.requests.close_lane()

    async def settled(self, request_id: str) -> admin_pb2.GetRequestTraceResponse | None:
        """`trace`; of a request that has just ended, once the stages have reported its last step."""
        deadline = time.monotonic() + MAX_SETTLE_S
        while isinstance(live := self._kept.get(request_id), LiveRequest) and live.ended and live.sequence:
            if time.monotonic() > deadline or self._is_reported(live):
                break
            await asyncio.sleep(POLL_S)
        return self.trace(request_id)

    def trace(self, request_id: str) -> admin_pb2.GetRequestTraceResponse | None:
        """Where a request's time went so far; None if it is not among the kept."""
        kept = self._kept.get(request_id)
        if isinstance(kept, bytes):
            return admin_pb2.GetRequestTraceResponse.FromString(kept)
        return self._trace(_outline(kept) if isinstance(kept, LiveRequest) else kept) if kept else None

    def _trace(self, outline: Outline) -> admin_pb2.GetRequestTraceResponse:
        response = admin_pb2.GetRequestTraceResponse.FromString(outline.told)
        if outline.first_step:
            response.stages.extend(self._traces(outline.prefill_steps, outline.decode_steps))
        if response.stages:
            response.limiting_stage = max(response.stages, key=_busy_ms).stage_index
        return response

    def _traces(self, prefill: Int64, decode: Int64) -> list[admin_pb2.StageTrace]:
        return [
            admin_pb2.StageTrace(
                stage_index=stage.index,
                prefill=self._phase(stage, prefill),
                decode=self._phase(stage, decode),
            )
            for stage in self._stages
        ]

    def _phase(self, stage: StageLink, numbers: Int64) -> admin_pb2.PhaseTrace:
        phase = _phase(stage.timings.of(numbers))
        if phase.num_steps:
            first, last = int(numbers[0]), int(numbers[-1])
            phase.bubble_share = self._records.bubble_share(stage.timings, first, last)
        return phase


def _outline(live: LiveRequest) -> Outline:
    sequence = live.sequence
    told = admin_pb2.GetRequestTraceResponse(
        request_id=live.request.request_id,
        state="failed" if live.error else live.finish.value if live.finish else "running",
        prompt_tokens=len(live.request.prompt),
        output_tokens=sequence.num_generated if sequence else 0,
        trace_id=live.request.trace[:16].hex(),
    )
    if live.first_token:
        told.ttft_ms = (live.first_token - live.arrived) * 1e3
    if live.admitted:
        told.queue_ms = (live.admitted - live.arrived) * 1e3
    if live.ended:
        told.total_ms = (live.ended - live.arrived) * 1e3
    return Outline(
        told.SerializeToString(),
        np.array(sequence.prefill_steps if sequence else (), np.int64),
        sequence.sampled_steps if sequence else np.zeros(0, np.int64),
    )


def _phase(times_ns: Int64) -> admin_pb2.PhaseTrace:
    if not len(times_ns):
        return admin_pb2.PhaseTrace()
    queue, wait, receive, compute, send = (float(total) for total in times_ns.sum(axis=0) / _MS)
    p50, p99 = _percentiles_ms(times_ns[:, COLUMNS.index("compute")])
    busy_p50, busy_p99 = _percentiles_ms(times_ns[:, BUSY].sum(axis=1))
    return admin_pb2.PhaseTrace(
        num_steps=len(times_ns),
        queue_ms=queue,
        wait_ms=wait,
        receive_ms=receive,
        compute_ms=compute,
        send_ms=send,
        compute_p50_ms=p50,
        compute_p99_ms=p99,
        busy_p50_ms=busy_p50,
        busy_p99_ms=busy_p99,
    )


def _percentiles_ms(times_ns: Int64) -> tuple[float, float]:
    """p50 and p99 by nearest rank; a tenth of np.percentile's price, which every request pays."""
    ordered = np.sort(times_ns)
    last = len(ordered) - 1
    return float(ordered[last // 2]) / _MS, float(ordered[min(last, len(ordered) * 99 // 100)]) / _MS


def _busy_ms(stage: admin_pb2.StageTrace) -> float:
    return sum(phase.receive_ms + phase.compute_ms + phase.send_ms for phase in (stage.prefill, stage.decode))
