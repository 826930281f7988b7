"""What the mesh takes beside its stages' costs: the delays of a simulation file, each measured on the mesh itself.

All processes are on one host, so times of one can be set against those of another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np
import numpy.typing as npt
from load import Arrivals, Request, play
from sim_mesh import SimMesh

from stagemesh.v1 import admin_pb2, admin_pb2_grpc
from stagemesh.wire.columns import U64, unpack

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

BURSTS = 7
"""Whose medians are taken."""
BURST_S = 1.0
"""That each is watched."""
ANSWER_S = 10.0
"""That the router may take to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlDelays:
    """Milliseconds, named as in a simulation file."""

    request: float
    admit: float
    step: float
    result: float
    client: float
    link: float
    """Of the burst's first steps, which share the processors with the router's work on the burst."""
    ttft_p50: float
    """Of such a burst, at the client."""

    def keys(self) -> dict[str, str]:
        """Of `router` in a simulation file."""
        names = ("request", "admit", "step", "result", "client")
        return {name: f"{max(getattr(self, name), 0.0):.4f}ms" for name in names}


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the steps of some seconds did; nanoseconds of one clock."""

    sent: Int64
    """[steps] by the router, as soon as it was formed."""
    done: Int64
    """[steps] when the router had the result; 0 without one."""
    rows: Int64
    """[steps] sequences."""
    prefill: Int64
    """[steps] positions of prompts."""
    arrivals: Int64
    """[stages, steps] of the step itself."""
    begins: Int64
    """[stages, steps] of computing."""
    ends: Int64

    @classmethod
    def of(cls, response: admin_pb2.GetTimelineResponse) -> Timeline:
        """The steps that all stages have reported."""
        numbers = _column(response.numbers)
        for stage in response.stages:
            numbers = np.intersect1d(numbers, _column(stage.numbers))
        sent, done, rows, prefill = (
            _column(data)[np.searchsorted(_column(response.numbers), numbers)]
            for data in (
                response.sent_unix_ns,
                response.done_unix_ns,
                response.rows,
                response.prefill_tokens,
            )
        )
        arrivals, begins, ends = [], [], []
        for stage in response.stages:
            here = np.searchsorted(_column(stage.numbers), numbers)
            arrived, queue, wait, receive, compute = (
                _column(data)[here]
                for data in (
                    stage.arrival_unix_ns,
                    stage.queue_ns,
                    stage.wait_ns,
                    stage.receive_ns,
                    stage.compute_ns,
                )
            )
            arrivals.append(arrived)
            begins.append(arrived + queue + wait + receive)
            ends.append(begins[-1] + compute)
        return cls(sent, done, rows, prefill, np.stack(arrivals), np.stack(begins), np.stack(ends))

    def link_ms_of(self, first: slice) -> float:
        """What the first steps take from stage to stage on average: from when a stage has ended the step before, and the
        stage before it this one, to its begin."""
        before = np.concatenate([np.zeros((len(self.ends), 1), np.int64), self.ends[:, :-1]], axis=1)
        late = self.begins[1:] - np.maximum(self.ends[:-1], before[1:])
        return float(late[:, first].mean()) / 1e6 if len(late) else 0.0

    def link_ms(self) -> float:
        """From the end of a step on a stage to its begin on the next, on average, where that waited for it."""
        late = [self._late(stage, self.ends[stage - 1, 1:]) for stage in range(1, len(self.ends))]
        return float(np.mean([one.mean() for one in late])) if late else 0.0

    def ring_ms(self) -> float:
        """The same from the last stage to the first, for the tokens of the newest step that has ended by then."""
        ended = np.sort(self.ends[-1])
        newest = np.searchsorted(ended, self.begins[0, 1:]) - 1
        return float(self._late(0, np.where(newest >= 0, ended[newest], 0)).mean())

    def _late(self, stage: int, sent: Int64) -> Float64:
        """[samples] milliseconds from [steps - 1], when the input of all steps but the first was sent, to their begin."""
        waited = (self.ends[stage, :-1] <= sent) & (self.arrivals[stage, 1:] <= sent)
        late: Float64 = (self.begins[stage, 1:] - sent)[waited] / 1e6
        return late if len(late) else np.zeros(1)


@contextmanager
def timeline(mesh: SimMesh, seconds: float) -> Iterator[list[Timeline]]:
    """Watch what the block does, for so long at most; the list has the timeline after it."""
    taken: list[Timeline] = []

    def watch() -> None:
        with grpc.insecure_channel(mesh.admin, (("grpc.max_receive_message_length", 64 << 20),)) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            request = admin_pb2.GetTimelineRequest(seconds=seconds)
            taken.append(Timeline.of(stub.GetTimeline(request, timeout=seconds + ANSWER_S)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield taken
    finally:
        watcher.join()


def control_delays(mesh: SimMesh, requests: Sequence[Request]) -> ControlDelays:
    """From bursts on an idle, warm mesh: medians.

    Args:
        mesh: Warm.
        requests: Of a burst, all alike.
    """
    bursts = []
    for index in range(BURSTS):
        with timeline(mesh, BURST_S) as taken:
            arrivals = play(mesh.listen, requests, timeout_s=30, seed=20 + index)
        bursts.append(_burst(mesh, arrivals, taken[0]))
    return ControlDelays(
        **{
            name: float(np.median([getattr(burst, name) for burst in bursts]))
            for name in ("request", "admit", "step", "result", "client", "link", "ttft_p50")
        }
    )


def _burst(mesh: SimMesh, arrivals: Arrivals, steps: Timeline) -> ControlDelays:
    with grpc.insecure_channel(mesh.admin) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        traces = [
            stub.GetRequestTrace(admin_pb2.GetRequestTraceRequest(request_id=str(index)), timeout=ANSWER_S)
            for index in range(len(arrivals.sent))
        ]
    ttft = arrivals.ttft() * 1e3
    queued = np.array([trace.queue_ms for trace in traces])
    # Requests are taken in one after the other, and those of a step leave at once: the first of them has waited longer
    # than the last by what it took to take in those between.
    last = int(steps.rows[0]) - 1
    request = float(queued[0] - queued[last]) / max(last, 1)
    taken_in = request * (len(ttft) - 1 - last)
    follows = len(steps.sent) > 1 and bool(steps.prefill[1])
    first = slice(1 + follows)
    return ControlDelays(
        request=request,
        # From arrival to arrival: a step that has been formed may leave when the next one has been, too.
        admit=float(steps.arrivals[0, 1] - steps.arrivals[0, 0]) / 1e6 / (len(ttft) - 1 - last)
        if follows
        else 0.0,
        step=float(queued[last]) - taken_in + float(steps.arrivals[0, 0] - steps.sent[0]) / 1e6,
        result=float((steps.done - steps.ends[-1])[first].mean()) / 1e6,
        client=(float(ttft[0]) - traces[0].ttft_ms) / 2,
        link=steps.link_ms_of(first),
        ttft_p50=float(np.percentile(ttft, 50)),
    )


def _column(data: bytes) -> Int64:
    return unpack(data, U64, "timeline").astype(np.int64)
