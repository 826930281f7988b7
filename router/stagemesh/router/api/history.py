"""Traces of the last requests: where their time went, stage by stage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagemesh.router.api.stream import RequestStream
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.router.lane.timings import BUSY, COLUMNS
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.tracing.tracing import RouterTracing
from stagemesh.v1 import admin_pb2

REQUESTS_KEPT = 1_000
SETTLE_S = 1.0
"""Stages report in batches: the last steps of a request are known this long after it ended."""
_MS = 1e6


@dataclass(slots=True)
class _Record:
    stream: RequestStream
    sequence: Sequence | None
    stages: list[admin_pb2.StageTrace] | None = None


class RequestHistory:
    """The last REQUESTS_KEPT requests, live ones included.

    Args:
        stages: Of the lane; their timings are read when a trace is made.
        tracing: Gets the sampled ones when they have ended.
    """

    def __init__(self, stages: Seq[StageLink], tracing: RouterTracing | None = None) -> None:
        self._stages = stages
        self._tracing = tracing
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def add(self, stream: RequestStream, sequence: Sequence | None) -> None:
        """Keep a request from its admission on."""
        self._records[stream.request.request_id] = _Record(stream, sequence)
        while len(self._records) > REQUESTS_KEPT:
            self._records.popitem(last=False)

    def settle(self, request_id: str) -> None:
        """Work out an ended request's times while the stages' are still kept, and let go of the rest."""
        record = self._records.get(request_id)
        if record and record.sequence:
            request = record.stream.request
            if self._tracing and request.trace:
                self._tracing.requests.add(
                    request.trace, record.stream.times, record.sequence, self._stages, self._tracing.steps.ids
                )
            record.stages = self._traces(record.sequence)
            record.sequence = None

    def trace(self, request_id: str) -> admin_pb2.GetRequestTraceResponse | None:
        """Where a request's time went so far; None if it is not among the kept."""
        record = self._records.get(request_id)
        if record is None:
            return None
        stream = record.stream
        times = stream.times
        stages = record.stages
        if stages is None:
            stages = self._traces(record.sequence) if record.sequence else []
        state = "failed" if stream.error else stream.finish.value if stream.finish else "running"
        response = admin_pb2.GetRequestTraceResponse(
            request_id=request_id,
            state=state,
            prompt_tokens=len(stream.request.prompt),
            output_tokens=stream.num_tokens,
            stages=stages,
            trace_id=stream.request.trace[:16].hex(),
        )
        if times.first_token:
            response.ttft_ms = (times.first_token - times.arrived) * 1e3
        if times.admitted:
            response.queue_ms = (times.admitted - times.arrived) * 1e3
        if times.ended:
            response.total_ms = (times.ended - times.arrived) * 1e3
        return response

    def _traces(self, sequence: Sequence) -> list[admin_pb2.StageTrace]:
        prefill = np.array(sequence.prefill_steps, np.int64)
        decode = np.array(sequence.decode_steps, np.int64)
        return [
            admin_pb2.StageTrace(
                stage_index=stage.index,
                prefill=_phase(stage.timings.of(prefill)),
                decode=_phase(stage.timings.of(decode)),
            )
            for stage in self._stages
        ]


def _phase(times_ns: npt.NDArray[np.int64]) -> admin_pb2.PhaseTrace:
    if not len(times_ns):
        return admin_pb2.PhaseTrace()
    queue, wait, receive, compute, send = (float(total) for total in times_ns.sum(axis=0) / _MS)
    computed = times_ns[:, COLUMNS.index("compute")]
    p50, p99 = (float(value) for value in np.percentile(computed, (50, 99)) / _MS)
    busy_p50, busy_p99 = (
        float(value) for value in np.percentile(times_ns[:, BUSY].sum(axis=1), (50, 99)) / _MS
    )
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
